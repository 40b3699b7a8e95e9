"""Teachers that encode queries and passages apart and compare their vectors: one a token, or one a text."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import send_to_device
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.util import truncate_embeddings
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor

from tct_hf.batches import in_parts, pad_alike, score_where_the_passages_are, stack_columns
from tct_hf.data.rows import checked_texts
from tct_hf.encoding.routes import has_routes, prompt_of
from tct_hf.encoding.weights import weights_digest
from tct_hf.files import command
from tct_hf.teachers.base import Columns, Dtype, Features, ModelTeacher, Rows, Texts

Side = Literal["query", "document"]

# Texts that tokenisers treat differently: markers, punctuation, special tokens; then more and more words, until they
# are cut: the last takes 25 ms.
_TOKEN_PROBES = [["", "a query, with punctuation.", "Ünïcode 検索", "[MASK] [SEP]"]]
_TOKEN_PROBES += [["word " * words] for words in (40, 640, 10_000)]

_KINDS = {"maxsim": "MaxSim", "meanmaxsim": "MeanMaxSim"}  # others go by the name of their similarity

# Texts that are tokenised together, and whose vectors are held padded at once, where many are encoded.
TEXTS_AT_ONCE = 256


class VectorTeacher(ModelTeacher):
    """A frozen model that turns every text into vectors, and a similarity of a query's vectors and a passage's."""

    shares_tokens = False

    def __init__(self, model: Any, *, dtype: Dtype = "auto", training_scale: float | None = None) -> None:
        super().__init__(model, dtype=dtype, training_scale=training_scale)
        self.score_kind = _KINDS.get(self.model.similarity_fn_name, self.model.similarity_fn_name)

    @abstractmethod
    def forward(self, features: Features, side: Side) -> tuple[Tensor, Tensor]:
        """Encode one padded batch: `(rows, vectors, dim)` and `(rows, vectors)` bool, those that are compared."""

    @abstractmethod
    def similarity(self, queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
        """`(queries, passages)` scores of float32 vectors `(rows, vectors, dim)`, as the model compares them."""

    def attach(self, student: SentenceTransformer) -> None:
        self.shares_tokens = read_alike(self.model, student)

    def announce(self, rows: Iterable[Mapping[str, Any]], columns: Texts, *, queries: int, devices: int) -> None:
        if not self.shares_tokens:  # else the trainer has said it
            super().announce(rows, columns, queries=queries, devices=devices)

    def preprocess(self, texts: Sequence[str], side: Side) -> dict[str, Any]:
        """Tokens of texts, with the model's prompt."""
        return _preprocess(self.model, checked_texts(texts, f"{side} texts"), side)

    def collate(self, queries: Texts, columns: Columns, rows: Rows) -> dict[str, Any] | None:
        if self.shares_tokens:
            return None
        return {
            "query": self.preprocess(queries, "query"),
            "columns": [self.preprocess(column, "document") for column in columns],
        }

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        """Passages of all columns go through the encoder sorted by length, and scores are compared in float32.

        With several devices queries travel to the passages, see :func:`tct_hf.batches.score_where_the_passages_are`.
        """
        return self.score_and_embed(inputs, gather=gather)[0]

    def score_and_embed(self, inputs: Mapping[str, Any], *, gather: bool) -> tuple[Tensor, list[Tensor] | None]:
        self.model.eval()
        with torch.inference_mode():
            queries, passages = self.encode([inputs["query"]], "query"), self.encode(inputs["columns"], "document")
        return self.compare_and_embed(*queries, *passages, gather=gather)

    def encode(self, columns: Sequence[Features], side: Side) -> tuple[Tensor, Tensor]:
        """Tokenised columns to `(columns * rows, vectors, dim)` of the compute type and its mask, column by column."""

        def forward(features: Features) -> tuple[Tensor, Tensor]:
            # A shallow copy: a model's modules write into the dict that they are given.
            vectors, mask = self.forward(dict(features), side)
            # Rounded to what the encoder computes in, however many devices there are: they exchange vectors in it.
            return vectors.to(self.compute_dtype), mask.bool()

        with self.computing():
            merged = stack_columns(columns)
            if merged is not None:
                vectors, mask = in_parts(merged, forward, self.tokens_per_pass)
            else:  # not padded text (packed for flash attention, images): a pass a column
                vectors, mask = (torch.cat(pad_alike(parts)) for parts in zip(*map(forward, columns), strict=True))
        return vectors, mask

    def compare(
        self, queries: Tensor, query_mask: Tensor, passages: Tensor, passage_mask: Tensor, *, gather: bool
    ) -> Tensor:
        """The score matrix of the queries' and all columns' vectors and masks, as :meth:`encode` returns them."""

        def similarity(queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
            return self.similarity(queries.float(), passages.float(), query_mask, passage_mask).float()

        # A trainer's own autocast would compare the vectors in half precision.
        with torch.autocast(self.device.type, enabled=False):
            if gather and get_world_size() > 1:
                columns = len(passages) // len(queries)
                return score_where_the_passages_are(queries, query_mask, passages, passage_mask, columns, similarity)
            return similarity(queries, passages, query_mask, passage_mask)

    def compare_and_embed(
        self, queries: Tensor, query_mask: Tensor, passages: Tensor, passage_mask: Tensor, *, gather: bool
    ) -> tuple[Tensor, list[Tensor] | None]:
        """As :meth:`compare`, and the vectors by column where there is one a text."""
        with torch.inference_mode():
            scores = self.compare(queries, query_mask, passages, passage_mask, gather=gather)
        # Copies: a tensor of inference mode can't be kept for a backward pass.
        if self.embedding_dim is None:
            return scores.clone(), None
        columns = [queries[:, 0], *passages[:, 0].split(len(queries))]
        return scores.clone(), [column.to(torch.float32, copy=True) for column in columns]

    def vectors(self, texts: Sequence[str], side: Side) -> list[np.ndarray]:
        """`(vectors, dim)` float16 of each of any number of queries or passages."""
        self.model.eval()
        texts = checked_texts(texts, f"{side} texts")
        if side == "query":
            self.say_cut_queries(texts)
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        made: dict[int, np.ndarray] = {}
        with torch.inference_mode():
            for start in range(0, len(order), TEXTS_AT_ONCE):
                rows = order[start : start + TEXTS_AT_ONCE]
                features = send_to_device(_preprocess(self.model, [texts[row] for row in rows], side), self.device)
                made |= zip(rows, halves(*self.encode([features], side)), strict=True)
        return [made[row] for row in range(len(texts))]

    def scores(self, queries: Sequence[np.ndarray], passages: Sequence[np.ndarray]) -> Tensor:
        """Compare vectors of :meth:`vectors`: `(queries, passages)` float32, on the model's device."""
        with torch.inference_mode():
            parts = send_to_device((*padded(queries), *padded(passages)), self.device)
            return self.compare(*parts, gather=False).clone()

    def list_scores(self, query: str, passages: Texts) -> Tensor:
        if not passages:
            return torch.zeros(0)
        return self.scores(self.vectors([query], "query"), self.vectors(passages, "document"))[0].cpu()


class ColBERTTeacher(VectorTeacher):
    """A late-interaction teacher: MaxSim over token vectors, or their mean where the model compares by MeanMaxSim.

    Args:
        model: a multi-vector model of this package, sentence-transformers, PyLate or the Stanford code, or a path or
            Hub id of one.
        dtype: what the encoder computes in. "auto": bfloat16 where the hardware has it. Scores are float32 always, and
            so are the weights where the encoder computes in it.
        training_scale: see :class:`Teacher`; read from the checkpoint when None, 1.0 where it says nothing.

    Attributes:
        chunk_elements: most numbers that are held at once to compare tokens, whatever the batch.

    Raises:
        ValueError: an unknown dtype, a scale that is not positive, or a model that is no trained ColBERT.

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 3.1; Khattab and Zaharia, arXiv 2004.12832.
    """

    model: MultiVectorEncoder
    model_class = MultiVectorEncoder
    what = "ColBERT"
    heads = ("HF_ColBERT", "ForRetrieval")
    head, trained_with = "its projection", f"build_colbert, {command('train')}"
    chunk_elements: int = 1 << 24

    def forward(self, features: Features, side: Side) -> tuple[Tensor, Tensor]:
        out = self.model(features, task=side)
        return out["token_embeddings"], out["attention_mask"]

    def similarity(self, queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
        return self.model.similarity(
            queries, passages, a_mask=query_mask, b_mask=passage_mask, chunk_elements=self.chunk_elements
        )


class DenseTeacher(VectorTeacher):
    """An embedding model as a teacher of scores, of its vectors, or of both: one vector a text.

    Vectors are compared as the model compares them; a student learns them too where its `embedding_weight` is above 0.
    Arguments and errors as of :class:`ColBERTTeacher`; the model is a SentenceTransformer, whose own prompts, pooling
    and similarity are used.
    """

    model: SentenceTransformer
    model_class = SentenceTransformer
    what = "embedding model"

    @property
    def embedding_dim(self) -> int | None:
        return self.model.get_embedding_dimension()

    def forward(self, features: Features, side: Side) -> tuple[Tensor, Tensor]:
        vectors = self.model(features, task=side)["sentence_embedding"]
        vectors = truncate_embeddings(vectors, self.model.truncate_dim)[:, None]
        return vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)

    def similarity(self, queries: Tensor, passages: Tensor, query_mask: Tensor, passage_mask: Tensor) -> Tensor:
        return self.model.similarity(queries[:, 0], passages[:, 0])


def _preprocess(model: Any, texts: Sequence[str], side: Side) -> dict[str, Any]:
    return dict(model.preprocess(list(texts), prompt=prompt_of(model, side), task=side))


def read_alike(one: Any, other: Any) -> bool:
    """Whether two models of vectors make the same tokens of texts."""
    if has_routes(one) or has_routes(other):
        return False
    # The vocabulary too: two of one family may agree on the probes and differ in a few words.
    if one.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        return False
    # Expanded queries show their length without a text that fills it, of which sentence-transformers warns once.
    expanded = [getattr(model[0], "query_expansion", None) for model in (one, other)]
    fixed = all(expansion is not None and expansion["strategy"] == "fixed" for expansion in expanded)
    for side, given in (("query", _TOKEN_PROBES[:1] if fixed else _TOKEN_PROBES), ("document", _TOKEN_PROBES)):
        for probes in given:
            mine, theirs = (_preprocess(model, probes, side) for model in (one, other))  # type: ignore[arg-type]
            names = {key for made in (mine, theirs) for key, value in made.items() if isinstance(value, Tensor)}
            if any(key not in made for key in names for made in (mine, theirs)):
                return False
            if not all(torch.equal(mine[key], theirs[key]) for key in names):
                return False
            if all(mine[key].shape[-1] < probes[0].count(" ") for key in names):
                break  # cut, as all longer texts will be
    return True


def pad_arrays(arrays: Sequence[np.ndarray], value: int = 0) -> np.ndarray:
    """`(rows, most, ...)` of arrays of different lengths, at least one wide."""
    out = np.full((len(arrays), max(1, *map(len, arrays)), *arrays[0].shape[1:]), value, dtype=arrays[0].dtype)
    for row, array in enumerate(arrays):
        out[row, : len(array)] = array
    return out


def padded(texts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Vectors of texts `(vectors, dim)` as `(texts, most vectors, dim)` and its mask, on the CPU."""
    vectors = pad_arrays(texts)
    mask = np.arange(vectors.shape[1]) < np.array([len(text) for text in texts])[:, None]
    return torch.from_numpy(vectors), torch.from_numpy(mask)


def halves(vectors: Tensor, mask: Tensor) -> list[np.ndarray]:
    """The reverse: `(vectors, dim)` float16 of each text."""
    whole, compared = vectors.to(torch.float16).cpu().numpy(), mask.cpu().numpy()
    return [text[used] for text, used in zip(whole, compared, strict=True)]


def describe_teacher(model: Any) -> dict[str, Any]:
    """What vectors depend on, JSON-ready: "weights", over names and values of all, and "encoding"."""
    modules = [{"type": type(module).__name__, **getattr(module, "get_config_dict", dict)()} for module in model]
    return {
        "weights": weights_digest(model),
        "encoding": {
            "prompts": dict(model.prompts),
            "modules": json.loads(json.dumps(modules, default=str)),
            "max_seq_length": model.max_seq_length,
            "truncate_dim": getattr(model, "truncate_dim", None),
        },
    }
