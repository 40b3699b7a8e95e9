"""How sharp a teacher must be: one scale a member, found where rankings are decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tct_hf.data.near_duplicates import folded
from tct_hf.data.qrels import ids_are_shared
from tct_hf.files import write_json_atomic
from tct_hf.teachers.ensemble import TeacherEnsemble
from tct_hf.teachers.mixture import members_of, search_mixture, set_weights, weights_of

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection
    from tct_hf.teachers.base import Teacher

# A query's candidates: member scores (members, candidates) and which candidates are positives, (candidates,) bool.
Lists = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Reading:
    """How well a distribution over candidates fits the judgements, averaged over queries.

    Attributes:
        cross_entropy: minus the log of the probability that all positives have together, in nats.
        entropy: entropy in nats.
        positive_on_top: share of the queries whose best candidate is a positive.
    """

    cross_entropy: float
    entropy: float
    positive_on_top: float


@dataclass(frozen=True)
class Calibration:
    """The scales of a teacher's members, and what they are worth.

    Attributes:
        weights: scale of each member's scores, by name.
        queries: how many queries they were found on.
        before: reading of the teacher with the scales it had.
        after: reading of the teacher with these.
        alone: reading of each member by itself, at its own best scale.
        student: reading of the student about to learn, at its own best scale; None where none was given.
        lead: by how many nats the teacher's cross-entropy is below the student's, scales found on one half of the
            queries and read on the other; None where no student was given.
    """

    weights: dict[str, float]
    queries: int
    before: Reading
    after: Reading
    alone: dict[str, Reading]
    student: Reading | None = None
    lead: float | None = None

    def save(self, folder: str | Path) -> None:
        """Write it into a folder, as JSON."""
        write_json_atomic(Path(folder) / "tct_calibration.json", asdict(self))

    def summary(self) -> str:
        """A few lines for people; says so where the teacher is no better than the student."""
        rows: list[tuple[str, float | None, Reading]]
        rows = [("teacher, before", None, self.before), ("teacher, after", None, self.after)]
        rows += [(f"{name} alone", self.weights[name], reading) for name, reading in self.alone.items()]
        rows += [("student", None, self.student)] if self.student is not None else []
        width = max(len(title) for title, _, _ in rows)
        lines = [
            f"calibrated on {self.queries} judged queries, each among its best candidates",
            f"{'':{width}}  weight  cross-entropy  entropy  positive on top",
        ]
        for title, weight, one in rows:
            shown = "" if weight is None else f"{weight:.3g}"
            figures = f"{one.cross_entropy:13.3f}  {one.entropy:7.3f}  {one.positive_on_top:15.1%}"
            lines.append(f"{title:{width}}  {shown:>6}  {figures}")
        if self.lead is not None and self.lead <= 0:
            lines.append(
                "The teacher knows no more than the student about to learn from it: expect no gain. Use another "
                "teacher, or labels."
            )
        return "\n".join(lines)


def calibrate(
    teacher: Teacher,
    collection: Collection,
    *,
    depth: int = 30,
    most: int = 300,
    student: Teacher | None = None,
) -> Calibration:
    """Find the scale of every member of a teacher, and set it.

    Scales are those under which the judged positives are most likely among each query's best candidates: there a
    ranking is decided. Among random passages, which are easy, a member that separates the best ones gets no weight.

    Args:
        teacher: a TeacherEnsemble with normalize="none", whose weights are set; or any other teacher, whose
            training_scale is set, so that a temperature of 1 / training_scale is calibrated.
        collection: collection with judgements of the split dev.
        depth: candidates a query, the best of the teacher (of BM25, where the teacher can't search).
        most: number of judged queries, drawn by a hash of their ids: the same ones whatever the order.
        student: the student about to learn, for comparison; a DenseTeacher of it.

    Raises:
        ValueError: no query has a positive among its candidates, an ensemble that normalises scores, or one with a
            weight that is not above 0.

    Source: listwise maximum likelihood (Cao et al., ICML 2007), all positives as one target.
    """
    if isinstance(teacher, TeacherEnsemble) and teacher.normalize != "none":
        raise ValueError('calibrate sets weights of raw scores: make the TeacherEnsemble with normalize="none".')
    members, start = members_of(teacher), weights_of(teacher)
    for name, weight in zip(members, start, strict=True):
        if not weight > 0:
            raise ValueError(f"calibrate starts from weights above 0, but that of {name} is {weight}.")
    given = collection.splits["dev"]
    judged = replace(given, queries={name: given.queries[name] for name in given.qrels})
    asked = replace(collection, splits={"dev": judged}, also={}).part(queries=most).splits["dev"].queries
    best = search_mixture(teacher, collection, asked, keep=depth)
    rows = {name: row for row, name in enumerate(collection.corpus["id"])}
    texts = collection.corpus["text"][:]
    same_ids = ids_are_shared(judged.qrels)
    lists, of_student = [], []
    for name, query in asked.items():
        # The query itself, as in ArguAna and Quora, is the best of its candidates to every member.
        itself = folded(query)
        passages = [
            passage
            for passage in best.get(name, ())
            if (passage != name or not same_ids) and folded(texts[rows[passage]]) != itself
        ]
        positive = torch.tensor([judged.qrels[name].get(passage, 0) > 0 for passage in passages], dtype=torch.bool)
        if not positive.any():
            continue
        found = [texts[rows[passage]] for passage in passages]
        lists.append((torch.stack([one.list_scores(query, found) for one in members.values()]), positive))
        if student is not None:
            of_student.append((student.list_scores(query, found)[None], positive))
    if not lists:
        raise ValueError(
            f"calibrate: none of the {len(asked)} dev queries has a judged positive among its candidates: judge "
            "more queries, or keep the default weights."
        )
    weights = fit_scales(lists, start)
    set_weights(teacher, weights)
    return Calibration(
        weights=dict(zip(members, weights, strict=True)),
        queries=len(lists),
        before=read(lists, start),
        after=read(lists, weights),
        alone={
            name: best_reading([(scores[place : place + 1], positive) for scores, positive in lists])
            for place, name in enumerate(members)
        },
        student=best_reading(of_student) if of_student else None,
        lead=held_out(of_student, [1.0]) - held_out(lists, start) if len(of_student) > 1 else None,
    )


def fit_scales(lists: Lists, start: Sequence[float]) -> list[float]:
    """The scales under which the positives are most likely, by L-BFGS on their logarithms from positive ones."""
    log_scales = torch.tensor(start, dtype=torch.float64).log().requires_grad_(True)
    optimizer = torch.optim.LBFGS([log_scales], max_iter=100, line_search_fn="strong_wolfe")
    ready = [(scores.double(), positive) for scores, positive in lists]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([_cross_entropy(log_scales.exp() @ scores, positive) for scores, positive in ready]).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return log_scales.detach().exp().tolist()


def held_out(lists: Lists, start: Sequence[float]) -> float:
    """Cross-entropy of queries whose judgements the scales were not found on: each half by the other's scales."""
    halves = (lists[::2], lists[1::2])
    folds = [(one, read(one, fit_scales(other, start)).cross_entropy) for one, other in (halves, halves[::-1])]
    return sum(len(one) * found for one, found in folds) / len(lists)


def best_reading(lists: Lists) -> Reading:
    """What one member by itself is worth at its best scale."""
    spread = torch.stack([scores.double().std() for scores, _ in lists]).mean().clamp(min=1e-6)
    return read(lists, fit_scales(lists, [float(1 / spread)]))


def read(lists: Lists, weights: Sequence[float]) -> Reading:
    """How well a weighted sum of the members' scores fits the judgements."""
    scale = torch.tensor(weights, dtype=torch.float64)
    pairs = [(scale @ scores.double(), positive) for scores, positive in lists]
    entropy = [torch.distributions.Categorical(logits=one).entropy() for one, _ in pairs]
    return Reading(
        cross_entropy=float(torch.stack([_cross_entropy(one, positive) for one, positive in pairs]).mean()),
        entropy=float(torch.stack(entropy).mean()),
        positive_on_top=sum(bool(positive[one.argmax()]) for one, positive in pairs) / len(pairs),
    )


def _cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    return logits.logsumexp(0) - logits[positive].logsumexp(0)
