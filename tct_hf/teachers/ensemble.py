"""Several teachers as one: their scores, made comparable query by query, in a weighted sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tct_hf.batches import own_places, spread_own
from tct_hf.teachers.base import Columns, Rows, Teacher, Texts

_KINDS = {"standard": "standard scores", "softmax": "log-probabilities", "none": "scores"}


class TeacherEnsemble(Teacher):
    """Weighted teachers, each normalised over the candidates of a query, or taken as it is.

    Teachers that all cover the whole batch, or all a query's own candidates, are added up over what they cover: known
    positives among the candidates, which the loss leaves out later, count in the normalisation.

    In a mixture (say stored cross-encoder scores for the own candidates and a ColBERT for the batch) the in-batch
    teachers say how probable every candidate is, their scores times their training scales averaged by weight. The own
    candidates keep the probability they have together, and how it is shared among them is up to all teachers:
    `log P_in-batch(own) + log_softmax over own of the weighted combination`. Such an ensemble covers the whole batch.

    With `normalize="none"` the mixture is log-linear: weighted sums of the teachers' own scores are the logits, of the
    in-batch teachers for the whole batch and of all teachers for how the own candidates share what they have together.
    A weight is then the factor that a teacher's scores need, and may be set later in :attr:`weights`.

    Vectors of texts are those of the first teacher that has any; its weight may be 0.

    Args:
        teachers: teachers and their weights, as a mapping or as pairs; weights are made to sum to 1, but for "none".
        normalize: "standard", scores of a query get zero mean and unit spread, a constant row gets zeros: scales do
            not matter, but of two candidates only the order is left; "softmax", scores times the teacher's training
            scale become log-probabilities: the margins stay, for teachers that are calibrated; "none", scores and
            weights stay as they are.

    Attributes:
        weights: `(teachers,)` numbers, in the order of `teachers`.

    Raises:
        ValueError: no teacher, a weight that is not above 0 (for "none": that is not finite; 0 is enough for a
            teacher with vectors of texts, but not for all), an unknown normalisation, or an ensemble within another.
    """

    def __init__(
        self,
        teachers: Mapping[Teacher, float] | Sequence[tuple[Teacher, float]],
        *,
        normalize: Literal["standard", "softmax", "none"] = "standard",
    ) -> None:
        pairs = list(teachers.items()) if isinstance(teachers, Mapping) else list(teachers)
        if not pairs:
            raise ValueError("A TeacherEnsemble needs at least one teacher: give {teacher: weight, ...}.")
        if normalize not in _KINDS:
            raise ValueError(f'normalize must be "standard", "softmax" or "none", got {normalize!r}.')
        for teacher, weight in pairs:
            if not isinstance(teacher, Teacher) or isinstance(teacher, TeacherEnsemble):
                raise ValueError(
                    f"A TeacherEnsemble holds teachers, no {type(teacher).__name__}: all teachers go into one list."
                )
            too_low = weight < 0 or (weight == 0 and teacher.embedding_dim is None)
            if not math.isfinite(weight) or (too_low and normalize != "none"):
                wanted = "a finite number" if normalize == "none" else "a number above 0"
                raise ValueError(f"The weight of a {type(teacher).__name__} is {weight}: give {wanted}.")
        total = 1.0 if normalize == "none" else sum(weight for _, weight in pairs)
        if not total:
            raise ValueError("All weights of a TeacherEnsemble are 0: give at least one teacher a number above 0.")
        self.members = self.teachers = [teacher for teacher, _ in pairs]
        self.weights = [weight / total for _, weight in pairs]
        self.normalize = normalize
        self.score_kind = f"weighted sum of {_KINDS[normalize]}"
        scoring = [teacher for teacher, weight in pairs if weight or normalize == "none"]
        self.covers = "own" if all(teacher.covers == "own" for teacher in scoring) else "in-batch"

    def collate(self, queries: Texts, columns: Columns, rows: Rows) -> dict[str, Any]:
        return {
            "teachers": [teacher.collate(queries, columns, rows) or {} for teacher in self.teachers],
            "shape": torch.zeros(len(queries), len(columns)),
        }

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        return self.score_and_embed(inputs, gather=gather)[0]

    def score_and_embed(self, inputs: Mapping[str, Any], *, gather: bool) -> tuple[Tensor, list[Tensor] | None]:
        prepared = zip(self.teachers, inputs["teachers"], strict=True)
        made = [one.score_and_embed({**inputs, **own}, gather=gather) for one, own in prepared]
        # (teachers, queries, candidates), zeros where a teacher scores own candidates only
        scores = self._mix(torch.stack([one.float() for one, _ in made]), inputs, gather=gather)
        return scores, next((vectors for _, vectors in made if vectors is not None), None)

    def _mix(self, scores: Tensor, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        whole = torch.tensor([teacher.covers == "in-batch" for teacher in self.teachers], device=scores.device)
        if all(teacher.covers == "in-batch" for teacher in self.teachers):
            return self._combine(scores)
        queries, columns = inputs["shape"].shape
        places, _ = own_places(queries, columns, scores.device, gather=gather)
        own = self._combine(scores.gather(2, places.expand(len(scores), -1, -1)))
        if self.covers == "own":
            return spread_own(own, gather=gather)
        factors = scores.new_tensor(self.weights) * whole
        if self.normalize != "none":
            factors = factors / factors.sum() * self._scales(scores)
        log_p = torch.log_softmax(_sum(factors, scores), dim=1)
        together = log_p.gather(1, places).logsumexp(1, keepdim=True)
        return log_p.scatter(1, places, together + torch.log_softmax(own, dim=1))

    def _combine(self, scores: Tensor) -> Tensor:
        """`(queries, candidates)`: the weighted sum of all teachers' scores, normalised over these candidates."""
        if self.normalize == "standard":
            scores = torch.stack([standard(each) for each in scores])
        elif self.normalize == "softmax":
            scores = torch.log_softmax(scores * self._scales(scores)[:, None, None], dim=2)
        return _sum(scores.new_tensor(self.weights), scores)

    def _scales(self, scores: Tensor) -> Tensor:
        return scores.new_tensor([teacher.training_scale for teacher in self.teachers])


def _sum(factors: Tensor, scores: Tensor) -> Tensor:
    # No product of matrices: a trainer's autocast would round it.
    return (factors[:, None, None] * scores).sum(0)


def standard(scores: Tensor) -> Tensor:
    """Zero mean and unit spread of each row `(queries, candidates)`; zeros for a row that is constant."""
    centred = scores - scores.mean(1, keepdim=True)
    largest = centred.abs().amax(1, keepdim=True)
    # What rounding leaves of a constant row is no spread. Squares are of numbers up to 1, which can't overflow.
    constant = largest <= 1e-6 * scores.abs().amax(1, keepdim=True)
    scaled = centred / largest.masked_fill(constant, 1.0)
    spread = scaled.square().mean(1, keepdim=True).sqrt()
    return torch.where(constant, 0.0, scaled / spread.masked_fill(constant, 1.0))
