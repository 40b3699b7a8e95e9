"""A teacher that reads query and passage together: the best scores, and a forward pass for every pair."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import send_to_device
from sentence_transformers import CrossEncoder
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor

from tct_hf.batches import in_parts, spread_own, stack_columns, texts_of_all
from tct_hf.data.rows import checked_texts
from tct_hf.progress import human_duration
from tct_hf.teachers.base import Columns, Dtype, Features, ModelTeacher, Rows, Teacher, Texts

logger = logging.getLogger(__name__)

# Pairs that are padded to one width before they are cut into passes of similar length.
_PAIRS_A_CHUNK = 256


class CrossEncoderTeacher(ModelTeacher):
    """A cross-encoder, live: its raw logit for every pair of query and passage.

    Args:
        model: a cross-encoder of one label, or a path or Hub id of one.
        candidates: "own", a query's own positive and negatives are scored, for `candidates="own"` of the loss; or
            "in-batch", every query with every passage of the batch (of all devices): a batch of 32 with one negative
            is 2,048 pairs instead of 64. What a batch will take is logged before training.
        dtype: what the model computes in. "auto": bfloat16 where the hardware has it. Scores are float32 always, and
            so are the weights where the model computes in it.
        max_length: tokens that a pair keeps; the model's own limit when None.
        training_scale: see :class:`Teacher`; read from the checkpoint when None, 1.0 where it says nothing.

    Raises:
        ValueError: an unknown setting, a model with more labels than one, or one that was never trained to score.

    Source: Nogueira and Cho, arXiv 1901.04085; distilled as in Hofstätter et al., arXiv 2010.02666.
    """

    model: CrossEncoder
    model_class = CrossEncoder
    what = "cross-encoder"
    heads: ClassVar[tuple[str, ...]] = ("ForSequenceClassification", "ForCausalLM")
    head, trained_with = "the head that scores a pair", "sentence_transformers.CrossEncoderTrainer"
    score_kind = "logit"
    _travels = False

    def __init__(
        self,
        model: CrossEncoder | str | Path,
        *,
        candidates: Literal["own", "in-batch"] = "own",
        dtype: Dtype = "auto",
        max_length: int | None = None,
        training_scale: float | None = None,
    ) -> None:
        if candidates not in ("own", "in-batch"):
            raise ValueError(f'candidates must be "own" or "in-batch", got {candidates!r}.')
        self.covers = candidates
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}.")
        super().__init__(model, dtype=dtype, training_scale=training_scale)
        if self.model.num_labels != 1:
            raise ValueError(
                f"The cross-encoder has {self.model.num_labels} labels, and a teacher gives one score a pair."
            )
        if max_length is not None:
            self.model.max_seq_length = max_length

    @classmethod
    def is_whole(cls, kind: str | None, modules: Sequence[str]) -> bool:
        # One alone is the encoder, whose architecture tells.
        return kind == "CrossEncoder" and len(modules) > 1

    def announce(self, rows: Iterable[Mapping[str, Any]], columns: Texts, *, queries: int, devices: int) -> None:
        """Log cut queries, and the pairs of a batch of the whole matrix, with how long they take by a few."""
        super().announce(rows, columns, queries=queries, devices=devices)
        if self.covers == "own":
            return
        timed = [*islice(rows, 4)]
        own = queries * len(columns)
        passages = sorted({row[name] for row in timed for name in columns})
        self.list_scores(timed[0]["query"], passages)  # the first pass also loads kernels
        begun = time.perf_counter()
        self.list_scores(timed[0]["query"], passages)
        each = (time.perf_counter() - begun) / len(passages)
        pairs = own * queries * devices
        logger.warning(
            f"The cross-encoder scores {pairs:,} pairs a batch on each device, where own candidates would be {own:,}: "
            f"about {human_duration(pairs * each)} a batch, own candidates {human_duration(own * each)}."
        )

    @property
    def slots_beside_passages(self) -> int | None:
        """Half of what a pair keeps: the longer of its two texts is cut first."""
        limit, added = self.model.max_seq_length, getattr(self.model.tokenizer, "num_special_tokens_to_add", None)
        return None if limit is None or added is None else (limit - added(pair=True)) // 2 + added(pair=False)

    def list_scores(self, query: str, passages: Texts) -> Tensor:
        self.say_cut_queries(checked_texts([query], "query texts"))
        return super().list_scores(query, passages)

    def to(self, device: torch.device) -> Teacher:
        # Workers know nothing of other processes' passages: then the texts travel, and pairs are made where they meet.
        self._travels = self.covers == "in-batch" and get_world_size() > 1
        return super().to(device)

    def collate(self, queries: Texts, columns: Columns, rows: Rows) -> dict[str, Any]:
        queries, columns = checked_texts(queries, "query texts"), [checked_texts(c, "document texts") for c in columns]
        if self._travels:
            return {"queries": queries, "passages": columns}
        if self.covers == "own":
            return self._pairs([(query, *(column[row] for column in columns)) for row, query in enumerate(queries)])
        passages = [text for column in columns for text in column]
        return self._pairs([(query, *passages) for query in queries])

    def _pairs(self, rows: Sequence[Sequence[str]]) -> dict[str, Any]:
        """Tokens of the pairs of each row's first text with its others, a pair once, and where each score belongs."""
        wanted = [[(query, passage) for passage in passages] for query, *passages in rows]
        # Similar lengths together; characters tell them well enough, and passes are cut by tokens later.
        pairs = sorted({pair for row in wanted for pair in row}, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
        place = {pair: number for number, pair in enumerate(pairs)}
        starts = range(0, len(pairs), _PAIRS_A_CHUNK)
        return {
            "chunks": [self._features(pairs[at : at + _PAIRS_A_CHUNK]) for at in starts],
            "places": torch.tensor([[place[pair] for pair in row] for row in wanted]),
        }

    def _features(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """One padded batch of pairs."""
        model: Any = self.model
        prompt = model.prompts[model.default_prompt_name] if model.default_prompt_name else None
        return dict(model.preprocess(pairs, prompt=prompt))

    def _forward(self, features: Features) -> list[Tensor]:
        """Raw scores `(pairs,)`."""
        # The module's own call, not predict(), which would put the logits through a sigmoid.
        return [self.model(dict(features))["scores"].float().reshape(-1)]

    def _score(self, chunks: Sequence[Features]) -> Tensor:
        """`(pairs,)` raw scores, in the order of the chunks."""
        self.model.eval()
        found: list[Tensor] = []
        with torch.inference_mode(), self.computing():
            for chunk in chunks:
                merged = stack_columns([chunk])  # None where it is not padded text (packed for flash attention)
                found += (
                    self._forward(chunk) if merged is None else in_parts(merged, self._forward, self.tokens_per_pass)
                )
            scores = torch.cat(found)
        return scores.clone()  # a tensor of inference mode can't be kept for a backward pass

    def score_matrix(self, inputs: Mapping[str, Any], *, gather: bool) -> Tensor:
        if "chunks" not in inputs:  # this process's queries with the passages of all
            passages = texts_of_all(inputs["passages"], gather=gather)
            inputs = self._pairs([(query, *passages) for query in inputs["queries"]])
            inputs = send_to_device(inputs, self.device)
        scores = self._score(inputs["chunks"])[inputs["places"]]
        return spread_own(scores, gather=gather) if self.covers == "own" else scores
