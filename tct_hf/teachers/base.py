"""What can score a batch. A teacher sees texts or tokens and returns one score matrix; it is never trained here."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from tct_hf.batches import sizes_of_all
from tct_hf.encoding.kinds import TRAINING_FILE
from tct_hf.files import write_json_atomic

Features = Mapping[str, Any]


class Teacher(ABC):
    """Scores every query of a batch against every candidate passage of it.

    A trainer calls :meth:`attach` once, :meth:`collate` for every batch in the data loader's workers, and
    :meth:`score_matrix` on the device. A teacher is no module of the student or of the loss, so its parameters are in
    no optimizer, no checkpoint and no distributed wrapper.

    Attributes:
        training_scale: what the teacher's scores were multiplied by in its own training; a temperature of
            1 / training_scale gives back the distribution it learned.
        covers: "in-batch", every passage of the batch is scored for every query; or "own", only a query's own positive
            and negatives. The rest of the matrix then holds zeros, which the mask of `candidates="own"` leaves out.
        score_kind: what a score is, for records: "MaxSim", "logit", ...
    """

    training_scale: float = 1.0
    covers: Literal["in-batch", "own"] = "in-batch"
    score_kind: str = "score"

    def check(self, columns: Sequence[str], *, candidates: str) -> None:
        """Refuse what can't be taught, before the first batch.

        Args:
            columns: of a data set that will be trained or evaluated on.
            candidates: of the loss, "in-batch" or "own".

        Raises:
            ValueError: the loss asks for candidates that this teacher does not score, or a column is missing.
        """
        if candidates == "in-batch" and self.covers == "own":
            raise ValueError(
                f"A {type(self).__name__} here scores a query's own candidates only, but the loss has "
                'candidates="in-batch": set candidates="own", mix it with a teacher of the whole batch in a '
                'TeacherEnsemble, or, if it is a CrossEncoderTeacher, accept the cost with its candidates="in-batch".'
            )

    def columns_read(self, names: Sequence[str]) -> list[str]:
        """The columns that this teacher reads beside texts and ids, whatever they are called.

        Args:
            names: all columns of a data set.
        """
        return []

    def announce(  # noqa: B027
        self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, queries: int, batches: int
    ) -> None:
        """Log what a batch will cost, where that is worth a word; called once, before the first step.

        Args:
            rows: a few of the training set, to be timed with; none where the rows are streamed.
            columns: its candidate columns.
            queries: of a process's batch.
            batches: whose candidates are scored together, one of each process.
        """

    def attach(self, student: SentenceTransformer) -> None:  # noqa: B027
        """Learn which student will be taught, before the first batch."""

    def to(self, device: torch.device) -> Teacher:
        """Move to the device that scores."""
        return self

    @abstractmethod
    def collate(
        self, queries: Sequence[str], columns: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """Prepare what this teacher needs of a batch.

        Args:
            queries: `(queries,)` texts.
            columns: candidate columns (positives, first negatives, ...), each `(queries,)` texts.
            rows: `(queries,)` rows of the data set, for ids.

        Returns:
            Tensors (nested in dicts and lists) for :meth:`score_matrix`; None when the student's tokens will do.
        """

    @abstractmethod
    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        """Score the batch, without gradients and in evaluation mode.

        Args:
            inputs: on the device, `{"query": features, "columns": [features, ...]}` with the student's own tokens, and
                what :meth:`collate` returned, which goes before these.
            gather: score against the candidates of all devices.

        Returns:
            `(queries, candidates)` float32: this device's queries against all positives in rank order, then all
            first negatives, and so on.
        """


class NoTeacher(Teacher):
    """Stands where a teacher would when only hard labels count (`hard_label_weight=1`): costs nothing, says nothing.

    The baseline of every distillation, by the same trainer, candidates and masks.
    """

    def collate(
        self, queries: Sequence[str], columns: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The shape of the batch is all there is to prepare."""
        return {"shape": torch.zeros(len(queries), len(columns))}

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        """Zeros, `(queries, candidates)`."""
        shape = inputs["shape"]
        queries, columns = shape.shape
        everyones = sum(sizes_of_all(queries, shape.device)) if gather else queries
        return shape.new_zeros(queries, columns * everyones)


def check_scale(value: Any) -> float:
    """A training scale as a float, refused where it is no finite number greater than 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 < value < float("inf"):
        raise ValueError(f"training_scale is {value!r}: it has to be a finite number greater than 0.")
    return float(value)


def read_training_scale(name_or_path: str) -> float:
    """The scale a teacher was trained at, as its checkpoint records it; 1.0 where it records nothing.

    Args:
        name_or_path: folder or Hub id.

    Raises:
        ValueError: the record is there but is not JSON, or says no finite number greater than 0.
    """
    from sentence_transformers.util import load_file_path

    path = load_file_path(name_or_path, TRAINING_FILE)
    if path is None:
        return 1.0
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        return check_scale(record.get("training_scale") if isinstance(record, dict) else None)
    except ValueError as error:  # not UTF-8, not JSON, or no scale
        raise ValueError(
            f'{path}: {error} Make it {{"training_scale": 1.0}} with the factor of the teacher\'s training, or remove '
            "the file."
        ) from None


def write_training_scale(path: str | Path, scale: float) -> None:
    """Record beside a teacher's checkpoint what its scores were multiplied by in training.

    Args:
        path: folder of the checkpoint.
        scale: the factor.

    Raises:
        ValueError: a scale that is not a finite number greater than 0.
        OSError: the file cannot be written.
    """
    write_json_atomic(Path(path) / TRAINING_FILE, {"training_scale": check_scale(scale)})
