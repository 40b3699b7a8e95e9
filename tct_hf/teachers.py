"""What can score a batch. A teacher sees texts or tokens and returns one score matrix; it is never trained here."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor

from tct_hf.batching import pad_tokens, parts_of_like_length, stack_columns
from tct_hf.bundled import told_when_missing
from tct_hf.digests import weights_digest
from tct_hf.distributed import score_where_the_passages_are, sizes_of_all
from tct_hf.files import write_json_atomic

Features = Mapping[str, Any]

TRAINING_FILE = "tct_teacher.json"

# Texts that tokenisers treat differently: markers, punctuation, special tokens, and more words than any limit.
_TOKEN_PROBES = ["", "a query, with punctuation.", "Ünïcode 検索", "[MASK] [SEP]", "word " * 40, "word " * 10_000]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16 (elsewhere it is emulated, and slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        if not hasattr(torch.cpu, "get_capabilities"):  # older torch does not tell
            return False
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return False


def check_dtype(dtype: str) -> None:
    """Refuse a setting that says nothing of what to compute in."""
    if dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f'dtype={dtype!r} is not known: use "auto", "bfloat16" or "float32".')


def compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """What a setting of "auto", "bfloat16" or "float32" comes to on a device."""
    wanted = dtype == "bfloat16" or (dtype == "auto" and has_bfloat16(device))
    return torch.bfloat16 if wanted else torch.float32


def unpack_half(model: torch.nn.Module, dtype: str, device: torch.device) -> None:
    """Make half-precision weights float32 where a teacher computes in it.

    Autocast only goes down, and transformers keeps the half precision that a checkpoint was saved in.
    """
    if compute_dtype(dtype, device) == torch.float32:
        model.float()


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


class ColBERTTeacher(Teacher):
    """A late-interaction teacher: MaxSim over token vectors.

    Args:
        model: a multi-vector model, or a path or Hub id of one (of this package, sentence-transformers, PyLate or the
            Stanford code).
        dtype: what the encoder computes in. "auto": bfloat16 where the hardware has it. Scores are float32 always, and
            so are the weights where the encoder computes in it.
        training_scale: see :class:`Teacher`; read from the checkpoint when None, 1.0 where it says nothing.
        tokens_per_pass: at most this many tokens go through the encoder at once.
        chunk_elements: at most this many numbers are held at once to compare tokens, whatever the batch.

    Raises:
        ValueError: an unknown dtype, a size or scale that is not positive, or a model that is no trained ColBERT.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.1; Khattab and Zaharia, arXiv 2004.12832.
    """

    score_kind = "MaxSim"

    def __init__(
        self,
        model: MultiVectorEncoder | str | Path,
        *,
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        training_scale: float | None = None,
        tokens_per_pass: int = 16_384,
        chunk_elements: int = 1 << 24,
    ) -> None:
        check_dtype(dtype)
        for name, size in (("tokens_per_pass", tokens_per_pass), ("chunk_elements", chunk_elements)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        path = str(model) if isinstance(model, (str, Path)) else None
        loaded = model if path is None else _load(path)
        if not isinstance(loaded, MultiVectorEncoder):
            raise ValueError(
                f"A ColBERTTeacher needs a MultiVectorEncoder, got {type(loaded).__name__}: load the model with "
                "sentence_transformers.MultiVectorEncoder."
            )
        self.model = loaded
        if training_scale is None:
            training_scale = read_training_scale(path) if path is not None else 1.0
        self.training_scale = check_scale(training_scale)
        self.dtype = dtype
        self.tokens_per_pass = tokens_per_pass
        self.chunk_elements = chunk_elements
        self.shares_tokens = False
        unpack_half(self.model, dtype, self.model.device)
        self.model.eval()

    def attach(self, student: SentenceTransformer) -> None:
        """Find out whether the student's tokens are this teacher's too."""
        # The vocabulary too: two of one family may agree on the probes and differ in a few words.
        self.shares_tokens = self.model.tokenizer.get_vocab() == student.tokenizer.get_vocab() and all(
            self._same_tokens(
                self._preprocess(probes, side),
                student.preprocess(probes, prompt=student.prompts.get(side), task=side),
            )
            for side, probes in (("query", self._query_probes(student)), ("document", _TOKEN_PROBES))
        )

    def _query_probes(self, student: SentenceTransformer) -> list[str]:
        # Expanded queries show their length without a text that fills it, of which sentence-transformers warns once.
        expanded = [getattr(model[0], "query_expansion", None) for model in (self.model, student)]
        fixed = all(expansion is not None and expansion["strategy"] == "fixed" for expansion in expanded)
        return _TOKEN_PROBES[:4] if fixed else _TOKEN_PROBES

    @staticmethod
    def _same_tokens(mine: Features, other: Features) -> bool:
        keys = {key for key, value in mine.items() if isinstance(value, Tensor)}
        return keys == {key for key, value in other.items() if isinstance(value, Tensor)} and all(
            torch.equal(mine[key], other[key]) for key in keys
        )

    def to(self, device: torch.device) -> ColBERTTeacher:
        """Move the model to the device that scores."""
        self.model.to(device)
        unpack_half(self.model, self.dtype, device)
        return self

    def _preprocess(self, texts: Sequence[str], side: str) -> dict[str, Any]:
        # The prompt that encode_query and encode_document would take.
        names = ("query",) if side == "query" else ("document", "passage", "corpus")
        prompts = self.model.prompts
        name = next((name for name in names if name in prompts), self.model.default_prompt_name)
        return dict(self.model.preprocess(list(texts), prompt=prompts[name] if name else None, task=side))

    def collate(
        self, queries: Sequence[str], columns: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """Tokenise the batch this teacher's way; None when the student tokenises alike."""
        if self.shares_tokens:
            return None
        return {
            "query": self._preprocess(queries, "query"),
            "columns": [self._preprocess(column, "document") for column in columns],
        }

    @property
    def _compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.dtype, self.model.device)

    def _forward(self, features: Features, side: str) -> tuple[Tensor, Tensor]:
        # A shallow copy: the model's scoring mask overwrites attention_mask in the dict it is given.
        out = self.model(dict(features), task=side)
        # Rounded to what the encoder computes in, however many devices there are: they exchange vectors in it.
        return out["token_embeddings"].to(self._compute_dtype), out["attention_mask"].bool()

    def _embed(self, columns: Sequence[Features], side: str) -> tuple[Tensor, Tensor]:
        """`(columns * queries, tokens, dim)` of the compute type and its mask, all of the first column first.

        Texts of like length go through the encoder together: padding is not computed.
        """
        merged = stack_columns(columns)
        if merged is None:  # not padded text (packed for flash attention, images): a pass a column
            parts = [self._forward(column, side) for column in columns]
            width = max(vectors.shape[1] for vectors, _ in parts)
            return (
                torch.cat([pad_tokens(vectors, width) for vectors, _ in parts]),
                torch.cat([pad_tokens(mask, width) for _, mask in parts]),
            )
        mask = torch.zeros_like(merged["attention_mask"], dtype=torch.bool)
        embeddings: Tensor | None = None
        for index, part in parts_of_like_length(merged, self.tokens_per_pass):
            vectors, scored = self._forward(part, side)
            width = scored.shape[1]
            if embeddings is None:
                embeddings = vectors.new_zeros(*mask.shape, vectors.shape[2])
            embeddings[index, :width] = vectors
            mask[index, :width] = scored
        assert embeddings is not None
        return embeddings, mask

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        """MaxSim of every query with every candidate, in chunks.

        Passages of all columns go through the encoder sorted by length; token vectors and what devices exchange are of
        the type that the encoder computes in, scores are compared in float32. With several devices queries travel to
        the passages, see :func:`tct_hf.distributed.score_where_the_passages_are`.
        """
        self.model.eval()
        with torch.inference_mode():
            scores = self._compare(*self._token_vectors(inputs), len(inputs["columns"]), gather=gather)
        return scores.clone()  # a tensor of inference mode can't be kept for a backward pass

    def _token_vectors(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Vectors and mask of the queries, then of the passages, all positives first."""
        return (*self._encode([inputs["query"]], "query"), *self._encode(inputs["columns"], "document"))

    def _encode(self, columns: Sequence[Features], side: str) -> tuple[Tensor, Tensor]:
        # One context for all passes: weights are cast to bfloat16 once, not once a pass.
        with torch.autocast(
            self.model.device.type, dtype=torch.bfloat16, enabled=self._compute_dtype == torch.bfloat16
        ):
            return self._embed(columns, side)

    def _compare(
        self,
        queries: Tensor,
        query_mask: Tensor,
        passages: Tensor,
        passage_mask: Tensor,
        columns: int,
        *,
        gather: bool,
    ) -> Tensor:
        # A trainer's own autocast would compare the tokens in half precision.
        with torch.autocast(self.model.device.type, enabled=False):
            if gather and get_world_size() > 1:
                return score_where_the_passages_are(
                    queries, query_mask, passages, passage_mask, columns, self._max_sim
                )
            return self._max_sim(queries, passages, query_mask, passage_mask)

    def _max_sim(self, queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
        return self.model.similarity(
            queries.float(),
            passages.float(),
            a_mask=query_mask,
            b_mask=passage_mask,
            chunk_elements=self.chunk_elements,
        ).float()


def describe_teacher(model: MultiVectorEncoder) -> dict[str, Any]:
    """What token vectors depend on, JSON-ready: "weights", over names and values of all, and "encoding"."""
    modules = [{"type": type(module).__name__, **getattr(module, "get_config_dict", dict)()} for module in model]
    return {
        "weights": weights_digest(model),
        "encoding": {"prompts": dict(model.prompts), "modules": json.loads(json.dumps(modules, default=str))},
    }


def _load(path: str) -> MultiVectorEncoder:
    _refuse_untrained(path)
    with told_when_missing(path):
        return MultiVectorEncoder(path)


def _refuse_untrained(name_or_path: str) -> None:
    """sentence-transformers would make a ColBERT with a random projection of any other model."""
    from sentence_transformers.util import load_file_path

    def read(file: str) -> dict[str, Any] | None:
        path = load_file_path(name_or_path, file)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))

    kind = (read("config_sentence_transformers.json") or {}).get("model_type")
    if kind in ("SentenceTransformer", "SparseEncoder", "CrossEncoder"):
        what = {"CrossEncoder": "one score a pair"}.get(kind, "one vector a text")
        raise ValueError(
            f"{name_or_path} is a {kind}, {what}, and no ColBERT: name the folder or Hub id "
            "of a multi-vector model (beside a student of the recipe that is the folder teacher)."
        )
    config = read("config.json")
    if config is None or load_file_path(name_or_path, "modules.json") is not None:
        return
    architectures = config.get("architectures") or []
    if not any(name == "HF_ColBERT" or name.endswith("ForRetrieval") for name in architectures):
        raise ValueError(
            f"{name_or_path} is a {', '.join(architectures) or 'bare encoder'} and no ColBERT: its projection would "
            "be random, and so would be what it teaches. Name the folder or Hub id of a trained one, or train one "
            "from it (build_colbert, recipes/train.py)."
        )


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
