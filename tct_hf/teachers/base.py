"""What can score a batch. A teacher sees texts or tokens and returns one score matrix; it is never trained here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import send_to_device
from sentence_transformers import SentenceTransformer
from torch import Tensor

from tct_hf import files
from tct_hf.batches import spread_own
from tct_hf.data.rows import checked_texts
from tct_hf.encoding.encoders import load_model
from tct_hf.encoding.kinds import TRAINING_FILE, read_json_of
from tct_hf.encoding.weights import compute_dtype, unpack_half
from tct_hf.retrieval.cut_queries import say_cut_queries

Features = Mapping[str, Any]
Texts = Sequence[str]
Columns = Sequence[Sequence[str]]  # candidate columns, each the texts of all queries
Rows = Sequence[Mapping[str, Any]]
Dtype = Literal["auto", "bfloat16", "float32"]

_LOOKED_AT = 1000  # queries that are looked at for being cut, before training and of those that are encoded
_CLASSES = ("SentenceTransformer", "MultiVectorEncoder", "SparseEncoder", "CrossEncoder")


class Teacher(ABC):
    """Scores every query of a batch against every candidate passage of it.

    A trainer calls :meth:`attach` once, :meth:`collate` for every batch in the data loader's workers, and
    :meth:`score_matrix` on the device. A teacher is no module of the student or of the loss, so its parameters are in
    no optimizer, no checkpoint and no distributed wrapper.

    Attributes:
        training_scale: factor of the teacher's scores in its own training; a temperature of 1 / training_scale gives
            back the distribution it learned.
        covers: "in-batch", every passage of the batch is scored for every query; or "own", only a query's own positive
            and negatives. The rest of the matrix then holds zeros, which the mask of `candidates="own"` leaves out.
        score_kind: what a score is, for records: "MaxSim", "logit", ...
        members: the teachers that this one is made of, which are checked, announced, attached and moved with it.
    """

    training_scale: float = 1.0
    covers: Literal["in-batch", "own"] = "in-batch"
    score_kind: str = "score"
    members: Sequence[Teacher] = ()

    def check(self, columns: Sequence[str], *, candidates: str) -> None:
        """Refuse what can't be taught, before the first batch.

        Args:
            columns: column names of a data set that will be trained or evaluated on.
            candidates: candidates of the loss, "in-batch" or "own".

        Raises:
            ValueError: the loss asks for candidates that this teacher does not score, or a column is missing.
        """
        if candidates == "in-batch" and self.covers == "own":
            raise ValueError(
                f"A {type(self).__name__} here scores a query's own candidates only, but the loss has "
                'candidates="in-batch": set candidates="own", of the loss, or "in-batch", of a teacher that takes it.'
            )
        for one in self.members:
            one.check(columns, candidates="own" if one.covers == "own" else candidates)

    def announce(self, rows: Iterable[Mapping[str, Any]], columns: Texts, *, queries: int, devices: int) -> None:
        """Say what a batch will cost, where that is much, before the first one.

        Args:
            rows: the data set.
            columns: their candidate columns.
            queries: rows of a batch on each device.
            devices: how many share their candidates.
        """
        for one in self.members:
            one.announce(rows, columns, queries=queries, devices=devices)

    def columns_read(self, names: Sequence[str]) -> list[str]:
        """The columns among a data set's that this teacher reads besides texts and ids."""
        return [name for one in self.members for name in one.columns_read(names)]

    @property
    def embedding_dim(self) -> int | None:
        """Dimensions of the vectors, one a text, that :meth:`score_and_embed` gives; None without vectors."""
        return next((one.embedding_dim for one in self.members if one.embedding_dim is not None), None)

    @property
    def device(self) -> torch.device:
        """Where it scores."""
        return next((one.device for one in self.members), torch.device("cpu"))

    def attach(self, student: SentenceTransformer) -> None:
        """Learn which student will be taught, before the first batch."""
        for one in self.members:
            one.attach(student)

    def to(self, device: torch.device) -> Teacher:
        """Move to the device that scores."""
        for one in self.members:
            one.to(device)
        return self

    @abstractmethod
    def collate(self, queries: Texts, columns: Columns, rows: Rows) -> dict[str, Any] | None:
        """Prepare what this teacher needs of a batch.

        Args:
            queries: `(queries,)` texts.
            columns: candidate columns (positives, first negatives, ...), each `(queries,)` texts.
            rows: `(queries,)` rows of the data set, for ids.

        Returns:
            What :meth:`score_matrix` needs, in dicts and lists; None when the student's tokens will do.
        """

    @abstractmethod
    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        """Score the batch, without gradients and in evaluation mode.

        Args:
            inputs: on the device, `{"query": features, "columns": [features, ...]}` with the student's own tokens,
                updated with what :meth:`collate` returned.
            gather: score against the candidates of all devices.

        Returns:
            `(queries, candidates)` float32: this device's queries against all positives in rank order, then all
            first negatives, and so on.
        """

    def score_and_embed(self, inputs: Mapping[str, Any], *, gather: bool) -> tuple[Tensor, list[Tensor] | None]:
        """Score the batch as :meth:`score_matrix`, and give the vectors that were computed for it.

        Returns:
            The score matrix; and `(queries, embedding_dim)` float32 of this device's queries, then of each candidate
            column, None where the teacher has no vectors of texts.
        """
        return self.score_matrix(inputs, gather=gather), None

    def list_scores(self, query: str, passages: Texts) -> Tensor:
        """Scores of one query's passages, `(passages,)` float32 on the CPU."""
        if not passages:
            return torch.zeros(0)
        prepared = self.collate([query], [[one] for one in passages], [{"query": query, "positive": passages[0]}])
        inputs = {"columns": [None] * len(passages), **(prepared or {})}
        return self.score_matrix(send_to_device(inputs, self.device), gather=False)[0].cpu()


class NoTeacher(Teacher):
    """A teacher without a word, for hard labels alone (`hard_label_weight=1`).

    The baseline of every distillation, by the same trainer, candidates and masks.
    """

    def collate(self, queries: Texts, columns: Columns, rows: Rows) -> dict[str, Any]:
        return {"scores": torch.zeros(len(queries), len(columns))}

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        return spread_own(inputs["scores"], gather=gather)


class ModelTeacher(Teacher):
    """A teacher that is a frozen model of sentence-transformers, given or loaded from a path or the Hub.

    Attributes:
        tokens_per_pass: most tokens that go through the model at once.
    """

    model: Any
    model_class: ClassVar[Any]
    what: ClassVar[str]  # its name in messages
    # How the names of architectures that score end, where the modules don't tell; of others `head` would be random.
    heads: ClassVar[tuple[str, ...]] = ("",)
    head: ClassVar[str] = ""
    trained_with: ClassVar[str] = ""
    tokens_per_pass: int = 16_384
    _to_look_at = _LOOKED_AT

    @property
    def slots_beside_passages(self) -> int | None:
        """Tokens that a query keeps beside a long passage; None where it is read alone."""
        return None

    def say_cut_queries(self, queries: Texts) -> None:
        """Warn once of queries that the model cuts, among the first thousand."""
        looked_at, fix = queries[: self._to_look_at], f"take another {self.what}, which reads longer ones"
        self._to_look_at -= len(looked_at)
        if say_cut_queries(self.model, looked_at, len(looked_at), beside=self.slots_beside_passages, fix=fix):
            self._to_look_at = 0

    def announce(self, rows: Iterable[Mapping[str, Any]], columns: Texts, *, queries: int, devices: int) -> None:
        """Warn of queries that the model cuts."""
        if isinstance(rows, Sized):  # a stream is not read for it
            self.say_cut_queries(checked_texts((row["query"] for row in islice(rows, _LOOKED_AT)), "queries"))

    def __init__(self, model: Any, *, dtype: Dtype = "auto", training_scale: float | None = None) -> None:
        path = str(model) if isinstance(model, (str, Path)) else None
        if path is not None:
            model = self.load(path)
        if not isinstance(model, self.model_class):
            raise ValueError(
                f"A {type(self).__name__} needs a {self.model_class.__name__}, got {type(model).__name__}."
            )
        self.model = model
        if training_scale is None:
            training_scale = read_training_scale(path) if path is not None else 1.0
        self.training_scale = check_scale(training_scale)
        self.dtype: Dtype = dtype
        self.to(model.device)
        model.eval()

    @classmethod
    def load(cls, name_or_path: str) -> Any:
        """The model of a folder or Hub id, unless it would be completed with random weights."""
        kind = (read_json_of(name_or_path, "config_sentence_transformers.json") or {}).get("model_type")
        if kind in _CLASSES and kind != cls.model_class.__name__:
            raise ValueError(f"{name_or_path} is a {kind} and no {cls.what}: name the folder or Hub id of one.")
        config, modules = (read_json_of(name_or_path, file) for file in ("config.json", "modules.json"))
        if config is not None and not cls.is_whole(kind, [one["type"].rpartition(".")[2] for one in modules or []]):
            architectures = config.get("architectures") or [""]
            if not any(name.endswith(cls.heads) for name in architectures):
                raise ValueError(
                    f"{name_or_path} is a {', '.join(architectures) or 'bare encoder'} and no {cls.what}: {cls.head} "
                    f"would be random. Name a trained one, or train one from it ({cls.trained_with})."
                )
        return cls.opened(name_or_path)

    @classmethod
    def opened(cls, name_or_path: str) -> Any:
        """The model of a folder or Hub id."""
        return load_model(cls.model_class, name_or_path)

    @classmethod
    def is_whole(cls, kind: str | None, modules: Sequence[str]) -> bool:
        """Whether a model of this recorded kind, with these modules, has a head whatever its architecture."""
        # An embedding model, whose kind older folders do not record, loses its pooling and gets a head.
        return bool(modules) and (kind is not None or "Pooling" not in modules)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the model computes in on its device."""
        return compute_dtype(self.dtype, self.device)

    def computing(self) -> torch.autocast:
        """The context of forward passes. One for many: weights are cast to bfloat16 once, not once a pass."""
        bf16 = self.compute_dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)

    def to(self, device: torch.device) -> Teacher:
        self.model.to(device)
        unpack_half(self.model, compute_dtype(self.dtype, device))
        return self


def check_scale(value: Any) -> float:
    """A training scale as a float, refused where it is no finite number greater than 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 < value < float("inf"):
        raise ValueError(f"training_scale is {value!r}: it must be a finite number greater than 0.")
    return float(value)


def read_training_scale(name_or_path: str) -> float:
    """The scale a teacher was trained at, as its folder or Hub repository records it; 1.0 where it records nothing."""
    try:
        record = read_json_of(name_or_path, TRAINING_FILE)
        return 1.0 if record is None else check_scale(record["training_scale"])
    except (ValueError, KeyError) as error:  # not UTF-8, not JSON, or no scale
        raise ValueError(
            f'{name_or_path}/{TRAINING_FILE}: {error} Make it {{"training_scale": 1.0}}, or remove the file.'
        ) from None


def write_training_scale(path: str | Path, scale: float) -> None:
    """Record in a teacher's folder the factor of its scores in training, a finite number greater than 0."""
    files.write_json_atomic(Path(path) / TRAINING_FILE, {"training_scale": check_scale(scale)})
