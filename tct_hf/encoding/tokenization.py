"""Tokenizers that make TCT input: `[CLS] $A`, no `[SEP]`, and a prompt whose tokens stand apart from the text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from tct_hf.encoding.kinds import PROMPTS

# Starts of texts that a tokenizer might join with the end of a prompt: letters, a digit, punctuation, an accent,
# an ideograph, a space.
_PROBES = ("a", "the", "word", "Word", "1", ".", "é", "中", " x", "")

_SPECIAL = ("unk_token", "bos_token", "eos_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tct_post_processor(token: str, token_id: int) -> TemplateProcessing:
    """What adds special tokens to a text: the start token only, no `[SEP]`."""
    return TemplateProcessing(single=f"{token} $A", pair=f"{token} $A $B:1", special_tokens=[(token, token_id)])


def tct_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, *, document_length: int, markers: Iterable[str] = ()
) -> TokenizersBackend:
    """A fresh tokenizer for TCT input, made from any fast tokenizer, which stays unchanged.

    Its class is `TokenizersBackend`, because model-specific classes (`BertTokenizer`) put `[SEP]` back on load. It
    truncates at `document_length`; `markers` are added tokens to leave out, such as the `[unused0]` of a ColBERT.
    """
    tokenizer = _fast(tokenizer)
    start = tokenizer.cls_token or tokenizer.bos_token
    if start is None:
        raise ValueError(
            f"{type(tokenizer).__name__} of {tokenizer.name_or_path!r} has neither a cls_token nor a bos_token, but "
            "TCT input starts with one: use a BERT-like encoder, or set tokenizer.cls_token to one of its tokens."
        )
    backend = _without_added_tokens(tokenizer.backend_tokenizer, markers)
    start_id = backend.token_to_id(start)
    if start_id is None:
        raise ValueError(
            f"{start!r}, the first token of every input of {tokenizer.name_or_path!r}, is not in the vocabulary: "
            "set tokenizer.cls_token to a token that is."
        )
    backend.post_processor = tct_post_processor(start, start_id)
    fresh = _made_of(backend, tokenizer, document_length)
    _check_prompts(fresh)
    return fresh


def own_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, *, document_length: int, markers: Iterable[str] = ()
) -> Any:
    """A tokenizer without a ColBERT's markers, with the encoder's own special tokens; unchanged without markers."""
    tokenizer = _fast(tokenizer)
    start = tokenizer.cls_token or tokenizer.bos_token
    if start and tokenizer("a")["input_ids"] == tokenizer(f"{start}a", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} adds {start!r} and no more, which is the TCT encoding's "
            'input: use encoding="tct", or begin with another encoder (a ColBERT of encoding="own").'
        )
    if markers := list(markers):
        return _made_of(_without_added_tokens(tokenizer.backend_tokenizer, markers), tokenizer, document_length)
    tokenizer.model_max_length = document_length
    return tokenizer


def _fast(tokenizer: PreTrainedTokenizerBase | None) -> Any:
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            f"{type(tokenizer).__name__} is not backed by the tokenizers library, which TCT input needs to leave out "
            "[SEP]: load the encoder with a fast tokenizer (a tokenizer.json)."
        )
    return tokenizer


def _without_added_tokens(backend: Tokenizer, markers: Iterable[str]) -> Tokenizer:
    """A copy in which the markers are ordinary text again, as in the tokenizer of the base model."""
    wanted = {marker.strip() for marker in markers} - {""}
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"].strip() not in wanted]
    state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))


def _made_of(backend: Tokenizer, tokenizer: PreTrainedTokenizerBase, document_length: int) -> TokenizersBackend:
    special = {name: getattr(tokenizer, name) for name in _SPECIAL if getattr(tokenizer, name) is not None}
    return TokenizersBackend(
        tokenizer_object=backend,
        name_or_path=tokenizer.name_or_path,
        model_max_length=document_length,
        model_input_names=list(tokenizer.model_input_names),
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
        **special,
    )


def _check_prompts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a prompt's tokens are a prefix of the tokens of the prompt with any text, and end as text."""
    shown = tokenizer.convert_ids_to_tokens
    for prompt in PROMPTS.values():
        alone = tokenizer(prompt)["input_ids"]
        # sentence-transformers takes a special token at the prompt's end for a [SEP] and counts one token less.
        if alone[-1] in tokenizer.all_special_ids:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path!r} ends the prompt {prompt!r} with a special token: "
                f"{shown(alone)}. The prompt's tokens would be miscounted and every vector silently wrong: use an "
                "encoder whose vocabulary has '[' and ']'."
            )
        for probe in (*_PROBES, tokenizer.mask_token or "a"):
            joined = tokenizer(prompt + probe)["input_ids"]
            if joined[: len(alone)] != alone:
                raise ValueError(
                    f"The tokenizer of {tokenizer.name_or_path!r} joins the prompt {prompt!r} with the text after it: "
                    f"alone it is {shown(alone)}, before {probe!r} it is {shown(joined)}. The prompt's tokens could "
                    "not be left out of the pooling, and every vector would be silently wrong. Byte-level BPE "
                    "(RoBERTa, GPT) and SentencePiece (XLM-R) do this with the space: use an encoder with a WordPiece "
                    'tokenizer, such as BERT, MiniLM or MPNet, or encoding="own".'
                )
