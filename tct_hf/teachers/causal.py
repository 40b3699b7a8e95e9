"""A causal language model as a teacher: does the passage answer the query, yes or no?"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from torch import Tensor

from tct_hf.encoding.encoders import told_of_files
from tct_hf.teachers.base import Dtype, Features
from tct_hf.teachers.cross_encoder import CrossEncoderTeacher

PROMPT = "Query: {query}\nPassage: {passage}\nDoes the passage answer the query? Reply yes or no.\n"


class _TwoWords(torch.nn.Module):
    """A head's logits of two words, in float32: bfloat16 would round each to a step of 1/8 from 16 on."""

    def __init__(self, head: Any, words: Sequence[int]) -> None:
        super().__init__()
        bias = getattr(head, "bias", None)
        # No parameters, whose dtype would be that of the model.
        self.register_buffer("weight", head.weight[[*words]].detach().float())
        self.register_buffer("bias", None if bias is None else bias[[*words]].detach().float())

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden.float(), self.weight, self.bias)  # type: ignore[arg-type]


class CausalRerankerTeacher(CrossEncoderTeacher):
    """A causal language model, live: the logit of "yes" less that of "no" after a prompt, for every pair.

    A passage that is too long is cut, and a query that takes more than half of what the prompt leaves; the prompt
    itself never is. A model that sentence-transformers saved as a CrossEncoder, with a prompt of its own, is a
    :class:`CrossEncoderTeacher`.

    Args:
        model: path or Hub id of a causal language model.
        prompt: text with {query} and {passage}, after which the model's next word is judged.
        yes: word of a passage that answers, one token.
        no: word of one that does not, one token.
        chat_template: put the prompt into the model's chat template, if it has one, as the user's message.
        candidates: as of :class:`CrossEncoderTeacher`, like the arguments that follow.
        dtype: as there.
        max_length: as there; set it for models that read long texts.
        training_scale: as there.

    Raises:
        ValueError: no causal language model, a word of several tokens, a prompt that lacks a place or fills the
            model's length.

    Source: Nogueira et al., arXiv 2003.06713, for the two words; Qwen3-Embedding, arXiv 2506.05176, section 2.
    """

    what = "causal language model"
    heads = ("ForCausalLM", "LMHeadModel")
    head, trained_with = "the head that chooses the next word", "as a language model"

    def __init__(
        self,
        model: str | Path,
        *,
        prompt: str = PROMPT,
        yes: str = "yes",
        no: str = "no",
        chat_template: bool = True,
        candidates: Literal["own", "in-batch"] = "own",
        dtype: Dtype = "auto",
        max_length: int | None = None,
        training_scale: float | None = None,
    ) -> None:
        if sorted(re.findall(r"{(query|passage)}", prompt)) != ["passage", "query"]:
            raise ValueError("prompt: it must hold {query} and {passage}, each once.")
        options: dict[str, Any] = {"candidates": candidates, "dtype": dtype, "max_length": max_length}
        super().__init__(model, training_scale=training_scale, **options)
        self.tokenizer: Any = self.model.tokenizer
        self.prompt, self._bare = prompt, True
        if chat_template and self.tokenizer.chat_template:
            said = [{"role": "user", "content": prompt}]
            how: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False}
            self.prompt, self._bare = self.tokenizer.apply_chat_template(said, tokenize=False, **how), False
        words = self._one_token("yes", yes), self._one_token("no", no)
        if words[0] == words[1]:
            raise ValueError(f"no: {no!r} is the same token as yes, {yes!r}: name another word.")
        inside: Any = self.model[0].model
        inside.set_output_embeddings(_TwoWords(inside.get_output_embeddings(), words))
        self._takes_positions = "position_ids" in inspect.signature(inside.forward).parameters
        limit, taken = self.model.max_seq_length, len(self._tokens([("", "")])[0])
        self._limit, self._room = limit or sys.maxsize, None if limit is None else limit - taken
        if self._room is not None and self._room < 2:
            raise ValueError(f"prompt: it takes {taken} of {limit} tokens: shorten it, or raise max_length.")

    @classmethod
    def opened(cls, name_or_path: str) -> Any:
        with told_of_files(name_or_path):
            transformer = Transformer(name_or_path, transformer_task="text-generation")
            return CrossEncoder(modules=[transformer, LogitScore(0, 1)])  # of the two words

    def _one_token(self, setting: str, word: str) -> int:
        ids = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(
                f"{setting}: {word!r} is no single token of this model ({self.tokenizer.convert_ids_to_tokens(ids)}): "
                f"name another word, such as {word.strip().capitalize()!r} or {' ' + word.strip()!r}."
            )
        return int(ids[0])

    @property
    def slots_beside_passages(self) -> int | None:
        """Half of what the prompt leaves."""
        return None if self._room is None else self._room // 2 + self.tokenizer.num_special_tokens_to_add(pair=False)

    def _tokens(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Tokens of the whole prompt of each pair."""
        texts = [
            re.sub(r"{(query|passage)}", lambda place: pair[place[1] == "passage"], self.prompt)  # noqa: B023
            for pair in pairs
        ]
        return self.tokenizer(texts, add_special_tokens=self._bare, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    def _cut(self, text: str, length: int) -> str:
        """The beginning of a text, of at most so many tokens."""
        starts = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = starts["offset_mapping"]
        return text if len(places) <= length else text[: places[max(0, length)][0]]

    def _fitting(self, query: str, passage: str) -> list[int]:
        """The tokens of a prompt that is too long, its texts cut."""
        assert self._room is not None
        query = self._cut(query, self._room // 2)
        while True:
            ids = self._tokens([(query, passage)])[0]
            if len(ids) <= self._limit or not passage:
                return ids
            there = len(self.tokenizer(passage, add_special_tokens=False, verbose=False)["input_ids"])
            passage = self._cut(passage, there - (len(ids) - self._limit))

    def _features(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """One batch of prompts, padded on the right like all others, so that it can be cut into passes."""
        rows = [
            ids if len(ids) <= self._limit else self._fitting(*pair)
            for pair, ids in zip(pairs, self._tokens(pairs), strict=True)
        ]
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True)
        lengths = torch.tensor([len(ids) for ids in rows])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        return {"input_ids": padded, "attention_mask": mask, "logits_to_keep": 1, "modality": "text"}

    def _forward(self, features: Features) -> list[Tensor]:
        """Raw scores `(pairs,)`, of tokens moved to the right: the last place is what the model answers after."""
        mask = features["attention_mask"]
        width = mask.shape[1]
        from_ = (torch.arange(width, device=mask.device) + mask.sum(1, keepdim=True)) % width
        moved = {name: features[name].gather(1, from_) for name in ("input_ids", "attention_mask")}
        if self._takes_positions:
            moved["position_ids"] = (moved["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return super()._forward({**features, **moved})
