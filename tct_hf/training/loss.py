"""One loss over a student's and a teacher's score matrix. It knows nothing of how either was made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, cast

import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.losses.gradcache import CachedLossMixin, has_static_embedding_input
from sentence_transformers.base.modules import Normalize
from sentence_transformers.util.distributed import get_world_size
from sentence_transformers.util.similarity import mean_maxsim
from torch import Tensor, nn

from tct_hf.batches import gather_rows, in_parts, sizes_of_all, stack_columns, take, token_lengths
from tct_hf.encoding.routes import has_routes, route_of
from tct_hf.training.codes import WHOLE, coded_scores
from tct_hf.training.embeddings import Projection, embedding_loss
from tct_hf.training.score_losses import (
    LOSS_SETTINGS,
    NUMBERS,
    Distance,
    KLDirection,
    at_least_float32,
    check_settings,
    coupled_loss,
    device_shares,
    masked,
    teacher_entropy,
)

NO_LABEL = -1  # of a row's positive_index
COSINE_SCALE = 20.0  # sentence-transformers' default too


@dataclass
class TeacherTargets:
    """What a batch's teacher says, and which candidates count.

    Rows are this process's queries. Columns are the candidates: all positives of the (gathered) batch in rank order,
    then all first negatives, and so on. Not a tensor: losses that wrap others slice or scale tensor labels.

    Args:
        scores: `(queries, candidates)` float32, the teacher's scores.
        mask: `(queries, candidates)` bool, True for candidates that take part in both softmaxes.
        positive_index: `(queries,)` int64, the column of each row's positive; -1 for a row without a label.
        label_weight: `(queries,)` float32, weight of each row's hard label; equal weights when None.
        embeddings: `(queries, dim)` float32, the teacher's vectors of the queries, then of each candidate column of
            this process, or of the queries alone; needed for an `embedding_weight`.
        report: figures that the loss leaves for the log: its parts, the teacher's entropy in nats and the share of
            rows where student and teacher agree on the top candidate; of a sparse student also the mean active
            dimensions of queries and passages, and the share of dimensions that are not.
    """

    scores: Tensor
    mask: Tensor
    positive_index: Tensor
    label_weight: Tensor | None = None
    embeddings: list[Tensor] | None = None
    report: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Cached:
    """What the gradient cache hands back to the loss: the targets, and how the passages were sorted."""

    targets: TeacherTargets
    columns: int = 0
    order: Tensor | None = None


class TightlyCoupledLoss(CachedLossMixin, nn.Module):
    """Distil a teacher's in-batch score matrix into a student of one vector a text, together with the hard labels.

    Args:
        model: the student, dense or sparse. Its embeddings are compared by dot product, normalised where the model
            compares by cosine. A sparse one needs a SpladeLoss around this loss, so that it stays sparse:
            :class:`~tct_hf.SparseTCTTrainer` makes it.
        temperature: divisor of the teacher's scores. Calibrated at 1 / (the scale the teacher was trained at).
        student_temperature: see :func:`coupled_loss`.
        hard_label_weight: see :func:`coupled_loss`.
        distillation_weight: see :func:`coupled_loss`.
        margin_mse_weight: see :func:`coupled_loss`.
        embedding_weight: weight of the distance to a dense teacher's vectors, see :func:`embedding_loss`. Above 0 the
            student must be dense; whole vectors are compared, whatever `matryoshka_dims`.
        embedding_distance: see :func:`embedding_loss`.
        student_divisor: see :func:`coupled_loss`.
        kl_direction: see :func:`coupled_loss`.
        student_scale: factor of the student's scores before anything else, which is no part of its checkpoint. None:
            20.0 where the student compares by cosine or ends in Normalize, 1.0 otherwise.
        candidates: "in-batch", every passage of the batch is a candidate of every query (the paper's method), or
            "own", only a query's own positive and negatives (its baseline).
        mini_batch_size: rows a forward pass when gradients are cached (large batches in little memory); None runs
            the whole batch at once.
        gather_across_devices: candidates are those of all devices' batches.
        matryoshka_dims: sizes d for which the first d dimensions of the embeddings are trained too; the parts are
            averaged. Slices of a student that compares by cosine are normalised, others never.
        passage_bits: bits of a passage's components that are trained for, such as [32, 1]: 32, vectors as they are; 8
            and 1, scores as Faiss's SQ8 and RaBitQ compute them of codes of the batch's candidates. The parts, of each
            of the `matryoshka_dims`, are averaged. See :func:`~tct_hf.training.codes.coded_scores`.
        query_bits: bits, 1 to 8, that a query's components are rounded to in all of these parts; None: as they are.
        self_coupled: weights of the student's own pooled score and own MaxSim, of the same forward pass and without
            gradient, added to the teacher's scores: the student is its own teacher. Hard labels then train both of
            its readings. Needs a dense student and the whole batch in one pass of one process.

    Raises:
        ValueError: a setting out of range.

    Inputs: texts (query, positive, negative_1, ..., negative_n) with n >= 0 negatives, and labels that are
    :class:`TeacherTargets`, which :class:`~tct_hf.TCTTrainer` makes from its teacher.

    Relations:
        - MultipleNegativesRankingLoss of sentence-transformers is this loss at `hard_label_weight=1`, with its
          default scale for a student that compares by cosine.
        - DistillKLDivLoss of sentence-transformers distils stored scores of a query's own candidates.

    Example:
        ::

            teacher = ColBERTTeacher("path/to/colbert")
            student = student_from_teacher(teacher)
            loss = TightlyCoupledLoss(student, temperature=1.0)
            TCTTrainer(student, teacher, train_dataset=triples, loss=loss).train()

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.2.
    """

    def __init__(
        self,
        model: SentenceTransformer | SparseEncoder,
        *,
        temperature: float = 0.25,
        student_temperature: float = 1.0,
        hard_label_weight: float = 0.1,
        distillation_weight: float | None = None,
        margin_mse_weight: float = 0.0,
        student_scale: float | None = None,
        student_divisor: float = 1.0,
        embedding_weight: float = 0.0,
        embedding_distance: Distance = "cosine",
        kl_direction: KLDirection = "forward",
        candidates: Literal["in-batch", "own"] = "in-batch",
        mini_batch_size: int | None = None,
        gather_across_devices: bool = True,
        matryoshka_dims: list[int] | None = None,
        passage_bits: list[int] | None = None,
        query_bits: int | None = None,
        self_coupled: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.is_sparse = isinstance(model, SparseEncoder)
        self.compares_by_cosine = not self.is_sparse and model.similarity_fn_name == "cosine"
        self.temperature = temperature
        self.student_temperature = student_temperature
        self.hard_label_weight = hard_label_weight
        self.distillation_weight = distillation_weight
        self.margin_mse_weight = margin_mse_weight
        unit = not self.is_sparse and (self.compares_by_cosine or isinstance(route_of(model, "query")[-1], Normalize))
        self.student_scale = student_scale if student_scale is not None else COSINE_SCALE if unit else 1.0
        self.student_divisor = student_divisor
        self.embedding_weight = embedding_weight
        self.embedding_distance: Distance = embedding_distance
        self.projection: Projection | None = None
        self.kl_direction: KLDirection = kl_direction
        self.candidates = candidates
        if has_static_embedding_input(model):
            mini_batch_size = None  # it has no activations to save, and rows that can't be cut
        self.mini_batch_size = mini_batch_size  # type: ignore[assignment]
        self.uses_gradient_cache = mini_batch_size is not None
        self.gather_across_devices = gather_across_devices
        self.matryoshka_dims = matryoshka_dims
        self.passage_bits, self.query_bits = passage_bits, query_bits
        self.self_coupled = self_coupled
        self.reported_settings: tuple[str, ...] = ()  # those that change over training
        self.check(get_world_size())

    def check(self, processes: int) -> None:
        """Refuse settings that are out of range, or that don't fit the student or the number of processes."""
        check_settings(self.get_config_dict())
        dimension = self.model.get_embedding_dimension()
        for d in self.matryoshka_dims or []:
            if not 0 < d <= (dimension or d):
                raise ValueError(f"matryoshka_dims: {d} is not between 1 and the embedding's {dimension} dimensions.")
        if self.self_coupled is not None and (self.is_sparse or processes > 1 or has_routes(self.model)):
            fix = "train a dense student without routes, in one process."
            raise ValueError(f"self_coupled compares tokens of a whole batch by one encoder: {fix}")
        if self.is_sparse and self.embedding_weight:
            raise ValueError("embedding_weight is for dense students: leave it out of a sparse one's loss.")

    def project_to(self, dim: int) -> None:
        """Compare with vectors of `dim` dimensions; where the student has others, by a projection that is learned."""
        with self.model.truncate_embeddings(None):  # whole vectors are compared
            own = self.model.get_embedding_dimension()
        if own is None or own == dim:
            self.projection = None
        elif self.projection is None or self.projection.out_features != dim:
            self.projection = Projection(own, dim).to(self.model.device)

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher's scores count at all."""
        scores = self.hard_label_weight < 1.0 if self.distillation_weight is None else self.distillation_weight > 0.0
        return scores or self.margin_mse_weight > 0.0

    @property
    def gathers(self) -> bool:
        """Whether a query's candidates come from all devices."""
        return self.gather_across_devices and self.candidates == "in-batch" and get_world_size() > 1

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: TeacherTargets
    ) -> dict[str, Tensor] | Tensor:
        """The parts of the loss of one batch, each `()`; with gradient caching their sum, one tensor.

        Args:
            sentence_features: the student's features of the columns query, positive, negative_1, ..., negative_n.
            labels: what the teacher says of the batch; its `report` is filled in.
        """
        features = list(sentence_features)
        if self.mini_batch_size is not None:
            return self._forward_in_mini_batches(features, labels)
        if self.self_coupled is not None:
            return self._forward_self_coupled(features, labels)
        queries, merged = self.model(features[0])["sentence_embedding"], self._merged(features[1:])
        if merged is None:
            columns = [self.model(column)["sentence_embedding"] for column in features[1:]]
        else:
            [passages] = in_parts(merged, lambda part: [self.model(part)["sentence_embedding"]])
            columns = list(passages.chunk(len(features) - 1))
        return self.compute_loss_from_embeddings([queries, *columns], labels)

    def _forward_self_coupled(self, features: list[dict[str, Tensor]], labels: TeacherTargets) -> dict[str, Tensor]:
        """The loss with the student's own readings in the teacher, and hard labels for its token vectors too."""
        assert self.self_coupled is not None
        unit = nn.functional.normalize

        def read(part: dict[str, Any]) -> list[Tensor]:
            out = self.model(part)
            return [out["sentence_embedding"], unit(out["token_embeddings"].float(), dim=2), out["attention_mask"]]

        merged = stack_columns(features[1:])
        assert merged is not None
        queries, query_tokens, query_mask = in_parts(features[0], read)
        passages, passage_tokens, passage_mask = in_parts(merged, read)
        with torch.autocast(queries.device.type, enabled=False):
            maxsim = mean_maxsim(query_tokens, passage_tokens, query_mask.bool(), passage_mask.bool())
            cosines = unit(queries.float(), dim=1) @ unit(passages.float(), dim=1).T
            own = (self.self_coupled[0] * cosines + self.self_coupled[1] * maxsim).detach()
        targets = replace(labels, scores=labels.scores + own)
        parts = self.compute_loss_from_embeddings([queries, *passages.chunk(len(features) - 1)], targets)
        parts["token_hard_label"] = coupled_loss(
            self.student_scale * maxsim,
            targets.scores,
            hard_label_weight=self.hard_label_weight,
            candidate_mask=labels.mask,
            positive_index=labels.positive_index,
            label_weight=labels.label_weight,
        )["hard_label"]
        labels.report["token_hard_label"] = parts["token_hard_label"].detach()
        return parts

    def _merged(self, columns: list[dict[str, Tensor]]) -> dict[str, Any] | None:
        # A compiled model is compiled for a few shapes: one pass a column.
        return None if hasattr(self.model, "_orig_mod") else stack_columns(columns)

    def _forward_in_mini_batches(self, features: list[dict[str, Tensor]], labels: TeacherTargets) -> Tensor:
        """The loss with gradients cached: passages of similar length share a mini-batch, whatever their column."""
        merged = self._merged(features[1:])
        if merged is None:
            return self.forward_cached(features, _Cached(labels))  # type: ignore[arg-type]
        order = torch.tensor(token_lengths(merged), device=merged["attention_mask"].device).argsort(stable=True)
        width = merged["attention_mask"].shape[1]
        passages = {key: take(value, order, width) for key, value in merged.items()}
        if isinstance(passages.get("prompt_length"), Tensor):  # of the first column alone, and to be cut like the rows
            passages["prompt_length"] = int(passages["prompt_length"].flatten()[0])
        cached = _Cached(labels, columns=len(features) - 1, order=order)
        return self.forward_cached([features[0], passages], cached)  # type: ignore[arg-type]

    def embed_minibatch(self, *args: Any, **kwargs: Any) -> Any:
        """Embeddings of a mini-batch, and beside them their projection: its weights get their gradient like others."""
        embeddings, state = super().embed_minibatch(*args, **kwargs)
        if self.projection is not None:
            embeddings = torch.cat([embeddings, self.projection(embeddings)], dim=1)
        return embeddings, state

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss over the embeddings of all mini-batches; called by the gradient cache."""
        cached = cast("_Cached", labels)
        embeddings = [torch.cat(column) for column in reps]
        if cached.order is not None:
            embeddings = [embeddings[0], *embeddings[1][cached.order.argsort()].chunk(cached.columns)]
        own = self.projection.in_features if self.projection else 0
        projected = [one[:, own:] for one in embeddings]
        embeddings = [one[:, :own] for one in embeddings] if self.projection else embeddings
        parts = self.compute_loss_from_embeddings(embeddings, cached.targets, projected)
        loss = torch.stack(list(parts.values())).sum()
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: TeacherTargets, projected: list[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The parts of the loss over embeddings, however they were made: plain, cached or sparse.

        Args:
            embeddings: `(queries, dim)` of the queries, then `(queries, dim)` of each candidate column.
            labels: what the teacher says of the batch.
            projected: the embeddings in the teacher's dimensions, computed here when None.

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
                f"{(len(queries), len(passages))}: it must have a row for each query and a column for each candidate."
            )
        # The report is of the last, the longest.
        read = [*product(sorted(self.matryoshka_dims or [queries.shape[1]]), sorted(self.passage_bits or [WHOLE]))]
        totals: dict[str, Tensor] = {}
        for d, bits in read:
            # Under autocast a matmul would come out in half precision: scores need all of float32.
            with torch.autocast(queries.device.type, enabled=False):
                compared = self._compared(queries, d), self._compared(passages, d)
                scores = self.student_scale * coded_scores(*compared, bits, self.query_bits)
            parts = coupled_loss(
                scores,
                labels.scores,
                **{name: getattr(self, name) for name in (*NUMBERS, "kl_direction")},
                candidate_mask=labels.mask,
                positive_index=labels.positive_index,
                label_weight=labels.label_weight,
            )
            for name, value in parts.items():
                totals[name] = totals.get(name, 0.0) + value / len(read)
        if self.embedding_weight:
            assert labels.embeddings is not None
            projected = projected or [self.projection(one) if self.projection else one for one in embeddings]
            distance = embedding_loss(projected, labels.embeddings, self.embedding_distance)
            totals["embedding"] = self.embedding_weight * distance
        shares = device_shares(labels.positive_index, labels.label_weight)
        totals = {name: value * shares[name] for name, value in totals.items()}
        with torch.no_grad():
            labels.report.update({name: value.detach() for name, value in totals.items()})
            labels.report.update({name: scores.new_tensor(getattr(self, name)) for name in self.reported_settings})
            if self.is_sparse:
                for side, vectors in (("query", queries), ("document", torch.cat(embeddings[1:]))):
                    active = (vectors != 0).sum(dim=1).float().mean()
                    labels.report[f"{side}_active_dims"] = active
                    labels.report[f"{side}_sparsity"] = 1.0 - active / vectors.shape[1]
            if self.asks_teacher:
                counts = labels.mask.any(dim=1)
                rows = counts.sum().clamp(min=1)
                agree = masked(scores, labels.mask).argmax(1) == masked(labels.scores, labels.mask).argmax(1)
                entropy = teacher_entropy(labels.scores, labels.mask, self.temperature)  # 0 without candidates
                labels.report["teacher_entropy"] = entropy.sum() / rows
                labels.report["top_agreement"] = (agree & counts).sum() / rows
        return totals

    def _compared(self, embeddings: Tensor, d: int) -> Tensor:
        sliced = at_least_float32(embeddings[:, :d])
        return nn.functional.normalize(sliced, dim=1) if self.compares_by_cosine else sliced

    def get_config_dict(self) -> dict[str, Any]:
        """The loss's settings, as the model card shows them."""
        return {name: getattr(self, name) for name in (*LOSS_SETTINGS, "gather_across_devices")}

    @property
    def citation(self) -> str:
        """BibTeX of the method, for the model card."""
        return """
@misc{lin2020distilling,
    title={Distilling Dense Representations for Ranking using Tightly-Coupled Teachers},
    author={Sheng-Chieh Lin and Jheng-Hong Yang and Jimmy Lin},
    year={2020}, eprint={2010.11386}, archivePrefix={arXiv}, primaryClass={cs.IR}
}
"""


def coupled_part(loss: Any) -> Any:
    """The coupled loss that a loss is, or holds: a sparse student's stands inside a SpladeLoss."""
    inner = getattr(loss, "loss", None)
    return inner if isinstance(inner, TightlyCoupledLoss) else loss


def coupled_parts(loss: Any) -> list[Any]:
    """The coupled losses of a trainer's loss, or of its dict of losses by data set."""
    return [coupled_part(one) for one in (loss.values() if isinstance(loss, dict) else [loss])]
