"""Several teachers as one: their scores, made comparable query by query, in a weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from tct_hf.distributed import own_places, spread_own
from tct_hf.teachers import Teacher

_Weighted = list[tuple[Teacher, float, Tensor]]


class TeacherEnsemble(Teacher):
    """Weighted teachers, each normalised over the candidates of a query.

    Teachers that all cover the whole batch, or all a query's own candidates, are added up over what they cover: known
    positives among the candidates, which the loss leaves out later, count in the normalisation.

    In a mixture (say stored cross-encoder scores for the own candidates and a ColBERT for the batch) the in-batch
    teachers say how probable every candidate is, their scores times their training scales averaged by weight. The own
    candidates keep the probability they have together, and how it is shared among them is up to all teachers:
    `log P_in-batch(own) + log_softmax over own of the weighted combination`. Such an ensemble covers the whole batch.

    Args:
        teachers: each to its weight, as a mapping or as pairs; weights are made to sum to 1.
        normalize: "standard", scores of a query get zero mean and unit spread, a constant row gets zeros: scales do
            not matter, but of two candidates only the order is left; "softmax", scores times the teacher's training
            scale become log-probabilities: the margins stay, for teachers that are calibrated.

    Raises:
        ValueError: no teacher, a weight that is not above 0, an unknown normalisation, or an ensemble within another.
    """

    def __init__(
        self,
        teachers: Mapping[Teacher, float] | Sequence[tuple[Teacher, float]],
        *,
        normalize: Literal["standard", "softmax"] = "standard",
    ) -> None:
        pairs = list(teachers.items()) if isinstance(teachers, Mapping) else list(teachers)
        if not pairs:
            raise ValueError("A TeacherEnsemble needs a teacher at least: give {teacher: weight, ...}.")
        if normalize not in ("standard", "softmax"):
            raise ValueError(f'normalize must be "standard" or "softmax", got {normalize!r}.')
        for teacher, weight in pairs:
            if not isinstance(teacher, Teacher) or isinstance(teacher, TeacherEnsemble):
                raise ValueError(
                    f"A TeacherEnsemble holds teachers, no {type(teacher).__name__}: give a Teacher and its weight; "
                    "the teachers of an ensemble go into one list."
                )
            if not 0.0 < weight < float("inf"):
                raise ValueError(f"The weight of a {type(teacher).__name__} is {weight}: give a number above 0.")
        total = sum(weight for _, weight in pairs)
        self.teachers = [teacher for teacher, _ in pairs]
        self.weights = [weight / total for _, weight in pairs]
        self.normalize = normalize
        self.score_kind = f"weighted sum of {'standard scores' if normalize == 'standard' else 'log-probabilities'}"
        self.covers = "own" if all(teacher.covers == "own" for teacher in self.teachers) else "in-batch"

    def check(self, columns: Sequence[str], *, candidates: str) -> None:
        """As each of the teachers."""
        super().check(columns, candidates=candidates)
        for teacher in self.teachers:
            teacher.check(columns, candidates="own" if teacher.covers == "own" else candidates)

    def columns_read(self, names: Sequence[str]) -> list[str]:
        """Those of all teachers."""
        return [name for teacher in self.teachers for name in teacher.columns_read(names)]

    def announce(
        self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, queries: int, batches: int
    ) -> None:
        """As each of the teachers."""
        for teacher in self.teachers:
            teacher.announce(rows, columns, queries=queries, batches=batches)

    def attach(self, student: SentenceTransformer) -> None:
        """As each of the teachers."""
        for teacher in self.teachers:
            teacher.attach(student)

    def to(self, device: torch.device) -> TeacherEnsemble:
        """Move all teachers to the device that scores."""
        for teacher in self.teachers:
            teacher.to(device)
        return self

    def collate(
        self, queries: Sequence[str], columns: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What each teacher prepares."""
        return {
            "teachers": [teacher.collate(queries, columns, rows) or {} for teacher in self.teachers],
            "shape": torch.zeros(len(queries), len(columns)),
        }

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        """The weighted sum; log-probabilities where teachers of both kinds are mixed."""
        queries, columns = inputs["shape"].shape
        places, _ = own_places(queries, columns, inputs["shape"].device, gather=gather)
        scored: _Weighted = []
        for teacher, weight, prepared in zip(self.teachers, self.weights, inputs["teachers"], strict=True):
            scored.append((teacher, weight, teacher.score_matrix({**inputs, **prepared}, gather=gather).float()))
        whole = [one for one in scored if one[0].covers == "in-batch"]
        if len(whole) == len(scored):
            return self._combine(scored)
        own = self._combine([(teacher, weight, scores.gather(1, places)) for teacher, weight, scores in scored])
        if not whole:
            return spread_own(own, gather=gather)
        share = sum(weight for _, weight, _ in whole)
        log_p = torch.log_softmax(
            torch.stack([weight / share * teacher.training_scale * scores for teacher, weight, scores in whole]).sum(
                0
            ),
            dim=1,
        )
        together = log_p.gather(1, places).logsumexp(1, keepdim=True)
        return log_p.scatter(1, places, together + torch.log_softmax(own, dim=1))

    def _combine(self, scored: _Weighted) -> Tensor:
        parts = [
            weight * (standard(scores) if self.normalize == "standard" else _log_p(scores, teacher.training_scale))
            for teacher, weight, scores in scored
        ]
        return torch.stack(parts).sum(0)


def standard(scores: Tensor) -> Tensor:
    """Zero mean and unit spread of each row `(queries, candidates)`; zeros for a row that is constant."""
    centred = scores - scores.mean(1, keepdim=True)
    largest = centred.abs().amax(1, keepdim=True)
    # What rounding leaves of a constant row is no spread. Squares are of numbers up to 1, which can't run over.
    constant = largest <= 1e-6 * scores.abs().amax(1, keepdim=True)
    scaled = centred / largest.masked_fill(constant, 1.0)
    spread = scaled.square().mean(1, keepdim=True).sqrt()
    return torch.where(constant, 0.0, scaled / spread.masked_fill(constant, 1.0))


def _log_p(scores: Tensor, scale: float) -> Tensor:
    return torch.log_softmax(scores * scale, dim=1)
