"""One loss over a student's and a teacher's score matrix. It knows nothing of how either was made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor, nn

from tct_hf.batching import parts_of_like_length, stack_columns, take, token_lengths
from tct_hf.distributed import gather_rows, sizes_of_all

NO_LABEL = -1  # of a row's positive_index


@dataclass
class TeacherTargets:
    """What a batch's teacher says, and which candidates count.

    Rows are this process's queries. Columns are the candidates: all positives of the (gathered) batch in rank order,
    then all first negatives, and so on.

    A dataclass and not a tensor, because losses that wrap others slice or scale tensor labels.

    Args:
        scores: `(queries, candidates)` float32, the teacher's scores.
        mask: `(queries, candidates)` bool, True for candidates that take part in both softmaxes.
        positive_index: `(queries,)` int64, the column of each row's positive; -1 for a row without a label.
        report: figures of this batch that the loss leaves for the log: each part of the loss, the teacher's entropy
            in nats and the share of rows where student and teacher agree on the top candidate.
    """

    scores: Tensor
    mask: Tensor
    positive_index: Tensor
    report: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Cached:
    """What the gradient cache hands back to the loss: the targets, and how the passages were sorted."""

    targets: TeacherTargets
    columns: int = 0
    order: Tensor | None = None


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def _at_least_float32(tensor: Tensor) -> Tensor:
    # bfloat16 keeps 8 bits: score differences that matter are lost in a softmax over it.
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_matrices(
    student_scores: Tensor, teacher_scores: Tensor, candidate_mask: Tensor | None, positive_index: Tensor | None
) -> None:
    if student_scores.ndim != 2 or student_scores.shape != teacher_scores.shape:
        raise ValueError(
            "student_scores and teacher_scores must be two (queries, candidates) matrices of one shape, got "
            f"{tuple(student_scores.shape)} and {tuple(teacher_scores.shape)}."
        )
    if candidate_mask is not None and candidate_mask.shape != student_scores.shape:
        raise ValueError(
            f"candidate_mask has shape {tuple(candidate_mask.shape)}, the score matrices "
            f"{tuple(student_scores.shape)}: give one bool per query and candidate."
        )
    if candidate_mask is not None and candidate_mask.dtype != torch.bool:
        raise ValueError(f"candidate_mask is {candidate_mask.dtype}: give bool, True for what counts.")
    queries, candidates = student_scores.shape
    if positive_index is None:
        if queries > candidates:
            raise ValueError(
                f"Without positive_index row i's positive is column i, but there are {queries} queries and only "
                f"{candidates} candidates: pass positive_index."
            )
        positive_index = torch.arange(queries, device=student_scores.device)
    if positive_index.shape != (queries,) or positive_index.dtype != torch.int64:
        raise ValueError(
            f"positive_index has shape {tuple(positive_index.shape)} and is {positive_index.dtype}: give one int64 "
            f"column per query, {(queries,)}, and -1 for a query without a label."
        )
    if positive_index.device.type != "cpu":
        return  # reading values would make the host wait for the device at every step
    if bool(((positive_index < -1) | (positive_index >= candidates)).any()):
        raise ValueError(
            f"positive_index holds {positive_index.tolist()}: columns are 0 to {candidates - 1}, and -1 is no label."
        )
    if candidate_mask is not None:
        kept = candidate_mask.gather(1, positive_index.clamp(min=0).unsqueeze(1)).squeeze(1)
        lost = ((positive_index >= 0) & ~kept & candidate_mask.any(dim=1)).nonzero().flatten().tolist()
        if lost:
            raise ValueError(
                f"candidate_mask leaves out the positive of rows {lost[:10]}, so that their loss is infinite: keep "
                "each row's positive, or give -1 as its positive_index."
            )


def _check_settings(temperature: float, student_temperature: float, hard_label_weight: float) -> None:
    for name, value in (("temperature", temperature), ("student_temperature", student_temperature)):
        if not 0.0 < value < float("inf"):
            raise ValueError(f"{name}={value} is no temperature: give a finite number greater than 0.")
    if not 0.0 <= hard_label_weight <= 1.0:
        raise ValueError(f"hard_label_weight={hard_label_weight} is no weight: give a number from 0 to 1.")


def coupled_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    temperature: float = 0.25,
    student_temperature: float = 1.0,
    hard_label_weight: float = 0.1,
    candidate_mask: Tensor | None = None,
    positive_index: Tensor | None = None,
) -> dict[str, Tensor]:
    """The loss of tightly-coupled distillation as a pure function of two score matrices.

    `hard_label_weight * -log P_student(positive) + (1 - hard_label_weight) * KL(P_teacher || P_student)`, the first
    averaged over the rows that have a label, the second over all rows. `P_teacher = softmax(teacher / temperature)`;
    the student's temperature divides its scores in the distillation part only, and there is no temperature-squared
    factor.

    Args:
        student_scores: `(queries, candidates)`, the student's raw scores (dot products).
        teacher_scores: `(queries, candidates)`, the teacher's raw scores; no gradient flows into them.
        temperature: divides the teacher's scores. The paper's 0.25 belongs to its own teacher.
        student_temperature: divides the student's scores in the distillation part.
        hard_label_weight: weight of the hard labels, from 0 to 1 (gamma of the paper).
        candidate_mask: `(queries, candidates)` bool, False for candidates that count in neither softmax. A row's
            positive must not be masked out: its loss is infinite (on the CPU, where looking costs nothing, an
            error). A row without any candidate adds 0 to both sums.
        positive_index: `(queries,)` int64, the column of each row's positive; row i's is column i when None; -1 marks
            a row without a label, which takes part in the distillation only.

    Returns:
        `{"hard_label": (), "distillation": ()}`, each already weighted, so that their sum is the loss.

    Raises:
        ValueError: shapes or types that do not fit, a temperature that is not positive, a weight outside 0 to 1.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.2, equations 4 and 5.
    """
    _check_matrices(student_scores, teacher_scores, candidate_mask, positive_index)
    _check_settings(temperature, student_temperature, hard_label_weight)

    student_scores = _masked(_at_least_float32(student_scores), candidate_mask)
    teacher_scores = _masked(teacher_scores.detach().to(student_scores.dtype), candidate_mask)
    counts = torch.ones(len(student_scores), dtype=torch.bool, device=student_scores.device)
    if candidate_mask is not None:
        # A softmax over no candidate at all is nan: such rows keep finite scores here and are left out below.
        counts = candidate_mask.any(dim=1)
        student_scores = student_scores.masked_fill(~counts.unsqueeze(1), 0.0)
        teacher_scores = teacher_scores.masked_fill(~counts.unsqueeze(1), 0.0)

    teacher_log_p = torch.log_softmax(teacher_scores / temperature, dim=1)
    student_log_p = torch.log_softmax(student_scores / student_temperature, dim=1)
    teacher_p = teacher_log_p.exp()
    # Where the teacher gives nothing (masked, or underflow) both logs may be -inf: 0 * (-inf - -inf) is nan.
    divergence = torch.where(teacher_p > 0, teacher_p * (teacher_log_p - student_log_p), 0.0)
    distillation = divergence.sum(dim=1).masked_fill(~counts, 0.0).mean()

    if positive_index is None:
        positive_index = torch.arange(len(student_scores), device=student_scores.device)
    labelled = positive_index >= 0
    log_p = torch.log_softmax(student_scores, dim=1)
    positive_log_p = log_p.gather(1, positive_index.clamp(min=0).unsqueeze(1)).squeeze(1)
    # torch.where, not a product: an unlabelled row may hold -inf, and 0 * -inf is nan.
    hard_label = -torch.where(labelled & counts, positive_log_p, 0.0).sum() / labelled.sum().clamp(min=1)
    return {
        "hard_label": hard_label_weight * hard_label,
        "distillation": (1.0 - hard_label_weight) * distillation,
    }


def teacher_entropy(teacher_scores: Tensor, candidate_mask: Tensor, temperature: float) -> Tensor:
    """Entropy of the teacher's distribution over each row's candidates.

    Args:
        teacher_scores: `(queries, candidates)`.
        candidate_mask: `(queries, candidates)` bool.
        temperature: divides the teacher's scores.

    Returns:
        `(queries,)` in nats; 0 where the softmax has underflowed to a single candidate.
    """
    log_p = torch.log_softmax(_masked(teacher_scores, candidate_mask) / temperature, dim=1)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(dim=1)


class TightlyCoupledLoss(CachedLossMixin, nn.Module):
    """Distil a teacher's in-batch score matrix into a single-vector student, together with the hard labels.

    Args:
        model: the student. Its embeddings are compared by plain dot product.
        temperature: divides the teacher's scores. Calibrated at 1 / (the scale the teacher was trained at).
        student_temperature: divides the student's scores in the distillation part.
        hard_label_weight: weight of the hard labels, from 0 to 1.
        candidates: "in-batch", every passage of the batch is a candidate of every query (the paper's method), or
            "own", only a query's own positive and negatives (its baseline).
        mini_batch_size: rows a forward pass when gradients are cached (large batches in little memory); None runs
            the whole batch at once.
        gather_across_devices: candidates are those of all devices' batches.
        matryoshka_dims: also train the first d dimensions of the embeddings, for each d; the parts are averaged.
            Embeddings are sliced, never normalised.

    Raises:
        ValueError: a setting that is no such thing.

    Requirements:
        1. Columns (query, positive, negative_1, ..., negative_n) with n >= 0 negatives.
        2. Labels that are :class:`TeacherTargets`: :class:`~tct_hf.TCTTrainer` makes them from its teacher.

    Inputs:
        +---------------------------------------------------+------------------+
        | Texts                                             | Labels           |
        +===================================================+==================+
        | (query, positive, negative_1, ..., negative_n)    | TeacherTargets   |
        +---------------------------------------------------+------------------+

    Relations:
        - MultipleNegativesRankingLoss of sentence-transformers is this loss at `hard_label_weight=1`.
        - DistillKLDivLoss of sentence-transformers distils stored scores of a query's own candidates.

    Example:
        ::

            from tct_hf import ColBERTTeacher, TCTTrainer, TightlyCoupledLoss, student_from_teacher

            teacher = ColBERTTeacher("path/to/colbert")
            student = student_from_teacher(teacher)
            loss = TightlyCoupledLoss(student, temperature=1.0)
            TCTTrainer(student, teacher, train_dataset=triples, loss=loss).train()

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.2.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        temperature: float = 0.25,
        student_temperature: float = 1.0,
        hard_label_weight: float = 0.1,
        candidates: Literal["in-batch", "own"] = "in-batch",
        mini_batch_size: int | None = None,
        gather_across_devices: bool = True,
        matryoshka_dims: list[int] | None = None,
    ) -> None:
        super().__init__()
        if candidates not in ("in-batch", "own"):
            raise ValueError(f'candidates must be "in-batch" or "own", got {candidates!r}.')
        if mini_batch_size is not None and mini_batch_size < 1:
            raise ValueError(
                f"mini_batch_size must be at least 1, or None for no gradient caching; got {mini_batch_size}."
            )
        _check_settings(temperature, student_temperature, hard_label_weight)
        dimension = model.get_embedding_dimension()
        for d in matryoshka_dims or []:
            if not 0 < d <= (dimension or d):
                raise ValueError(f"matryoshka_dims: {d} is not between 1 and the embedding's {dimension} dimensions.")
        self.model = model
        self.temperature = temperature
        self.student_temperature = student_temperature
        self.hard_label_weight = hard_label_weight
        self.candidates = candidates
        self.mini_batch_size = mini_batch_size  # type: ignore[assignment]
        self.uses_gradient_cache = mini_batch_size is not None
        self.gather_across_devices = gather_across_devices
        self.matryoshka_dims = matryoshka_dims
        self.reported_settings: tuple[str, ...] = ()  # those that change over training

    @property
    def gathers(self) -> bool:
        """Whether a query's candidates come from all devices."""
        return self.gather_across_devices and self.candidates == "in-batch" and get_world_size() > 1

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: TeacherTargets
    ) -> dict[str, Tensor] | Tensor:
        """The loss of one batch.

        Args:
            sentence_features: the student's features of the columns query, positive, negative_1, ..., negative_n.
            labels: what the teacher says of the batch.

        Returns:
            The two parts of the loss, each `()`; with gradient caching their sum, one tensor. Both ways
            `labels.report` then holds the parts and what else is worth logging.
        """
        features = list(sentence_features)
        if self.mini_batch_size is not None:
            return self._forward_in_mini_batches(features, labels)
        queries = self.model(features[0])["sentence_embedding"]
        return self.compute_loss_from_embeddings([queries, *self._embed_passages(features[1:])], labels)

    def _forward_in_mini_batches(self, features: list[dict[str, Tensor]], labels: TeacherTargets) -> Tensor:
        """The loss with gradients cached: passages of like length share a mini-batch, whatever their column."""
        merged = None if hasattr(self.model, "_orig_mod") else stack_columns(features[1:])
        if merged is None:
            return self.forward_cached(features, _Cached(labels))  # type: ignore[arg-type]
        order = torch.tensor(token_lengths(merged), device=merged["attention_mask"].device).argsort(stable=True)
        width = merged["attention_mask"].shape[1]
        passages = {key: take(value, order, width) for key, value in merged.items()}
        if isinstance(passages.get("prompt_length"), Tensor):  # of the first column alone, and to be cut like the rows
            passages["prompt_length"] = int(passages["prompt_length"].flatten()[0])
        cached = _Cached(labels, columns=len(features) - 1, order=order)
        return self.forward_cached([features[0], passages], cached)  # type: ignore[arg-type]

    def _embed_passages(self, columns: list[dict[str, Tensor]]) -> list[Tensor]:
        """`(queries, dim)` of each candidate column, passages of like length in one forward pass."""
        merged = None if hasattr(self.model, "_orig_mod") else stack_columns(columns)
        if merged is None:  # compiled for a few shapes, or not padded text: a pass a column
            return [self.model(column)["sentence_embedding"] for column in columns]
        parts = [(rows, self.model(part)["sentence_embedding"]) for rows, part in parts_of_like_length(merged)]
        order = torch.cat([rows for rows, _ in parts])
        return list(torch.cat([vectors for _, vectors in parts])[order.argsort()].chunk(len(columns)))

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss over the embeddings of all mini-batches; called by the gradient cache."""
        cached = cast("_Cached", labels)
        embeddings = [torch.cat(column) for column in reps]
        if cached.order is not None:
            embeddings = [embeddings[0], *embeddings[1][cached.order.argsort()].chunk(cached.columns)]
        parts = self.compute_loss_from_embeddings(embeddings, cached.targets)
        loss = torch.stack(list(parts.values())).sum()
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: TeacherTargets) -> dict[str, Tensor]:
        """The loss over embeddings, however they were made: plain, cached or sparse.

        Args:
            embeddings: `(queries, dim)` of the queries, then `(queries, dim)` of each candidate column.
            labels: what the teacher says of the batch.

        Returns:
            `{"hard_label": (), "distillation": ()}`, each already weighted.

        Raises:
            ValueError: the teacher scored other candidates than the student.
        """
        queries, columns = embeddings[0], embeddings[1:]
        if self.gathers:
            sizes = sizes_of_all(len(queries), queries.device)
            columns = [gather_rows(column, sizes, with_grad=True) for column in columns]
        passages = torch.cat(columns)  # (candidates, dim)
        if labels.scores.shape != (len(queries), len(passages)):
            raise ValueError(
                f"The teacher's score matrix is {tuple(labels.scores.shape)}, the student's "
                f"{(len(queries), len(passages))}: teacher and student must score the same queries and candidates. "
                "A Teacher's score_matrix returns one row a query of this process and one column a candidate."
            )
        dims = sorted(self.matryoshka_dims or [queries.shape[1]])  # the report is of the last, the longest
        totals: dict[str, Tensor] = {}
        for d in dims:
            # Under autocast a matmul would come out in half precision: scores need all of float32.
            with torch.autocast(queries.device.type, enabled=False):
                scores = _at_least_float32(queries[:, :d]) @ _at_least_float32(passages[:, :d]).T
            parts = coupled_loss(
                scores,
                labels.scores,
                temperature=self.temperature,
                student_temperature=self.student_temperature,
                hard_label_weight=self.hard_label_weight,
                candidate_mask=labels.mask,
                positive_index=labels.positive_index,
            )
            for name, value in parts.items():
                totals[name] = totals.get(name, 0.0) + value / len(dims)
        labelled, rows = self._shares(labels.positive_index)
        totals["hard_label"] = totals["hard_label"] * labelled
        totals["distillation"] = totals["distillation"] * rows
        with torch.no_grad():
            labels.report.update({name: value.detach() for name, value in totals.items()})
            labels.report.update({name: scores.new_tensor(getattr(self, name)) for name in self.reported_settings})
            if self.hard_label_weight < 1.0:  # else nobody has asked the teacher
                labels.report.update(self._against_teacher(scores, labels))
        return totals

    def _against_teacher(self, scores: Tensor, labels: TeacherTargets) -> dict[str, Tensor]:
        """The teacher's entropy and how often the student's top candidate is the teacher's, for the log."""
        agree = _masked(scores, labels.mask).argmax(1) == _masked(labels.scores, labels.mask).argmax(1)
        counts = labels.mask.any(dim=1)
        rows = counts.sum().clamp(min=1)
        entropy = teacher_entropy(labels.scores, labels.mask, self.temperature)  # 0 for a row without candidates
        return {"teacher_entropy": entropy.sum() / rows, "top_agreement": (agree & counts).sum() / rows}

    def _shares(self, positive_index: Tensor) -> Tensor:
        """`(2,)`: what turns this device's means over its labelled rows, and over its rows, into its part of the means
        over all devices' rows. A distributed wrapper averages over the devices, whatever each of them holds."""
        local = torch.stack(
            [(positive_index >= 0).sum(), torch.tensor(len(positive_index), device=positive_index.device)]
        )
        if get_world_size() == 1:
            return torch.ones_like(local)
        total = local.clone()
        dist.all_reduce(total)
        return local * get_world_size() / total.clamp(min=1)

    def get_config_dict(self) -> dict[str, Any]:
        """The loss's settings, as the model card shows them."""
        return {
            "temperature": self.temperature,
            "student_temperature": self.student_temperature,
            "hard_label_weight": self.hard_label_weight,
            "candidates": self.candidates,
            "mini_batch_size": self.mini_batch_size,
            "gather_across_devices": self.gather_across_devices,
            "matryoshka_dims": self.matryoshka_dims,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the method, for the model card."""
        return """
@misc{lin2020distilling,
    title={Distilling Dense Representations for Ranking using Tightly-Coupled Teachers},
    author={Sheng-Chieh Lin and Jheng-Hong Yang and Jimmy Lin},
    year={2020},
    eprint={2010.11386},
    archivePrefix={arXiv},
    primaryClass={cs.IR}
}
"""
