"""Tokenizers for TCT input: what is made, what stays unchanged, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tct_hf.encoding.encoders import tct_tokenizer
from tests.models import tiny_bert, tiny_mpnet


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {"bert": tiny_bert(root / "bert"), "mpnet": tiny_mpnet(root / "mpnet")}


@pytest.fixture
def given(paths: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(paths["bert"], padding_side="left", truncation_side="left")


def tokens(tokenizer: Any, text: str) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


def wordpiece(*vocabulary: str, **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(["[UNK]", *vocabulary])}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


def test_input_opens_with_the_start_token_and_has_no_sep(paths: dict[str, Path], given: Any) -> None:
    tokenizer = tct_tokenizer(given, document_length=20)
    assert tokens(tokenizer, "[Q] the teacher") == ["[CLS]", "[", "q", "]", "the", "teacher"]
    assert tokens(tokenizer, "") == ["[CLS]"]
    assert tokens(tokenizer, "the [MASK] [SEP]") == ["[CLS]", "the", "[MASK]", "[SEP]"]  # literal ones in a text
    pair = tokenizer("the", "teacher")
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == ["[CLS]", "the", "teacher"]
    assert pair["token_type_ids"] == [0, 0, 1]
    mpnet = tct_tokenizer(AutoTokenizer.from_pretrained(paths["mpnet"]), document_length=20)
    assert tokens(mpnet, "[D] the teacher") == ["<s>", "[", "d", "]", "the", "teacher"]
    bos = tct_tokenizer(wordpiece("<s>", "[", "]", "q", "d", bos_token="<s>"), document_length=20)
    assert tokens(bos, "q") == ["<s>", "q"]


def test_the_tokenizer_given_stays_as_it_is_and_hands_down_no_padding_or_truncation(given: Any) -> None:
    given(["the teacher", "a"], padding="max_length", truncation=True, max_length=3)  # sets the backend's state
    before = given.backend_tokenizer.to_str()
    fresh = tct_tokenizer(given, document_length=5, markers=["[unused0] "])
    fresh.add_tokens(["new"])
    assert given.backend_tokenizer.to_str() == before
    assert len(fresh("the teacher " * 10)["input_ids"]) == 21
    batch = fresh(["[D] the teacher", "a"], padding=True, truncation=True)
    assert [fresh.convert_ids_to_tokens(ids) for ids in batch["input_ids"]] == [
        ["[CLS]", "[", "d", "]", "the"],
        ["[CLS]", "a", "[PAD]", "[PAD]", "[PAD]"],
    ]


def test_what_can_not_make_tct_input_is_refused() -> None:
    lost = wordpiece("[CLS]", "[", "]", "q", "d", cls_token="[CLS]")
    lost._special_tokens_map["cls_token"] = "<s>"  # named, never added
    for tokenizer, message in (
        (wordpiece("[", "]", "q", "d"), "neither a cls_token nor a bos_token"),
        (lost, "'<s>', the first token of every input, is not in the vocabulary"),
        (wordpiece("[CLS]", "q", "d", cls_token="[CLS]"), r"ends the prompt '\[Q\] ' with a special token"),
        (None, "tokenizers library"),
    ):
        with pytest.raises(ValueError, match=message):
            tct_tokenizer(tokenizer, document_length=20)
    added = wordpiece("[CLS]", "[", "]", "q", "d", cls_token="[CLS]")
    added.add_special_tokens({"extra_special_tokens": ["[Q]"]})
    assert tokens(tct_tokenizer(added, document_length=20, markers=["[Q] "]), "[Q] q") == ["[CLS]", "[", "q", "]", "q"]
