"""Tokenizers for TCT input: what is made, what is left alone, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from tct_hf.encoding.tokenization import check_prompts_stand_apart, start_token, tct_tokenizer
from tests.models import tiny_bert, tiny_mpnet, tiny_roberta


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    make = {"bert": tiny_bert, "mpnet": tiny_mpnet, "roberta": tiny_roberta}
    return {name: function(root / name) for name, function in make.items()}


def tokens(tokenizer: Any, text: str) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


def wordpiece(vocabulary: list[str], **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_input_opens_with_the_start_token_and_has_no_sep(paths: dict[str, Path]) -> None:
    tokenizer = tct_tokenizer(AutoTokenizer.from_pretrained(paths["bert"]), document_length=20)
    assert tokens(tokenizer, "[Q] the teacher") == ["[CLS]", "[", "q", "]", "the", "teacher"]
    assert tokens(tokenizer, "") == ["[CLS]"]
    mpnet = tct_tokenizer(AutoTokenizer.from_pretrained(paths["mpnet"]), document_length=20)
    assert tokens(mpnet, "[D] the teacher") == ["<s>", "[", "d", "]", "the", "teacher"]


def test_pair_of_texts_has_no_sep_either(paths: dict[str, Path]) -> None:
    tokenizer = tct_tokenizer(AutoTokenizer.from_pretrained(paths["bert"]), document_length=20)
    pair = tokenizer("the", "teacher")
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == ["[CLS]", "the", "teacher"]
    assert pair["token_type_ids"] == [0, 0, 1]


def test_literal_special_tokens_in_a_text_are_those_tokens(paths: dict[str, Path]) -> None:
    tokenizer = tct_tokenizer(AutoTokenizer.from_pretrained(paths["bert"]), document_length=20)
    assert tokens(tokenizer, "the [MASK] [SEP]") == ["[CLS]", "the", "[MASK]", "[SEP]"]


def test_tokenizer_given_is_left_as_it_is(paths: dict[str, Path]) -> None:
    given = AutoTokenizer.from_pretrained(paths["bert"])
    before = given.backend_tokenizer.to_str()
    fresh = tct_tokenizer(given, document_length=20, markers=["[unused0] "])
    fresh(["the teacher", "a"], padding="max_length", truncation=True, max_length=3)
    fresh.add_tokens(["new"])
    assert given.backend_tokenizer.to_str() == before
    assert tokens(given, "the") == ["[CLS]", "the", "[SEP]"]


def test_padding_and_truncation_of_the_tokenizer_given_are_not_inherited(paths: dict[str, Path]) -> None:
    given = AutoTokenizer.from_pretrained(paths["bert"], padding_side="left", truncation_side="left")
    given(["the teacher", "a"], padding="max_length", truncation=True, max_length=3)  # sets the backend's state
    fresh = tct_tokenizer(given, document_length=5)
    assert len(fresh("the teacher " * 10)["input_ids"]) == 21
    assert tokens(fresh, "the") == ["[CLS]", "the"]
    batch = fresh(["[D] the teacher", "a"], padding=True, truncation=True)
    assert [fresh.convert_ids_to_tokens(ids) for ids in batch["input_ids"]] == [
        ["[CLS]", "[", "d", "]", "the"],
        ["[CLS]", "a", "[PAD]", "[PAD]", "[PAD]"],
    ]


@pytest.mark.parametrize("marker", ["[unused0]", "[Q] ", "[Q]"])
def test_markers_become_text_again(paths: dict[str, Path], marker: str) -> None:
    given = AutoTokenizer.from_pretrained(paths["bert"])
    plain = tct_tokenizer(given, document_length=20)
    given.add_tokens([marker], special_tokens=True)
    fresh = tct_tokenizer(given, document_length=20, markers=[f"{marker.strip()} ", "", "[D] "])
    text = f"[Q] a {marker} the"
    assert fresh(text)["input_ids"] == plain(text)["input_ids"]


def test_added_tokens_that_are_no_markers_stay(paths: dict[str, Path]) -> None:
    given = AutoTokenizer.from_pretrained(paths["bert"])
    given.add_tokens(["tct"])
    fresh = tct_tokenizer(given, document_length=20, markers=["[unused0]"])
    assert tokens(fresh, "the tct") == ["[CLS]", "the", "tct"]


def test_save_and_load_keep_class_and_ids(paths: dict[str, Path], tmp_path: Path) -> None:
    fresh = tct_tokenizer(AutoTokenizer.from_pretrained(paths["bert"]), document_length=20)
    fresh.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is TokenizersBackend
    assert not isinstance(loaded, BertTokenizer)
    assert loaded.model_max_length == 20
    assert loaded("[Q] the é [MASK]")["input_ids"] == fresh("[Q] the é [MASK]")["input_ids"]


def test_start_token_is_cls_or_else_bos(paths: dict[str, Path]) -> None:
    assert start_token(AutoTokenizer.from_pretrained(paths["bert"])) == "[CLS]"
    assert start_token(wordpiece(["[UNK]", "<s>", "[", "]"], bos_token="<s>", unk_token="[UNK]")) == "<s>"


def test_tokenizer_without_a_start_token_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a cls_token nor a bos_token"):
        tct_tokenizer(wordpiece(["[UNK]", "[", "]", "q", "d"], unk_token="[UNK]"), document_length=20)


def test_byte_level_bpe_is_refused_because_the_space_joins_the_text(paths: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"(?s)joins the prompt '\[Q\] '.*'Ġ'\].*before 'a'.*WordPiece"):
        tct_tokenizer(AutoTokenizer.from_pretrained(paths["roberta"]), document_length=20)


def test_vocabulary_without_brackets_is_refused_because_the_prompt_is_miscounted() -> None:
    tokenizer = wordpiece(["[UNK]", "[CLS]", "q", "d"], cls_token="[CLS]", unk_token="[UNK]")
    with pytest.raises(ValueError, match="ends the prompt '\\[Q\\] ' with a special token"):
        tct_tokenizer(tokenizer, document_length=20)


def test_prompt_registered_as_a_special_token_is_refused_unless_it_is_a_marker() -> None:
    vocabulary = ["[UNK]", "[CLS]", "[", "]", "q", "d"]
    tokenizer = wordpiece(vocabulary, cls_token="[CLS]", unk_token="[UNK]")
    tokenizer.add_special_tokens({"extra_special_tokens": ["[Q]"]})
    with pytest.raises(ValueError, match="with a special token"):
        check_prompts_stand_apart(tokenizer)
    fresh = tct_tokenizer(tokenizer, document_length=20, markers=["[Q] "])
    assert tokens(fresh, "[Q] q") == ["[CLS]", "[", "q", "]", "q"]


@pytest.mark.parametrize("nothing", [None, object()])
def test_what_is_no_fast_tokenizer_is_refused(nothing: Any) -> None:
    with pytest.raises(ValueError, match="tokenizers library"):
        tct_tokenizer(nothing, document_length=20)
