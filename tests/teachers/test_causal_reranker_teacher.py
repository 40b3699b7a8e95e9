"""A causal language model as a teacher: its scores are those of a plain loop over prompts."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tct_hf import CausalRerankerTeacher
from tests.models import tiny_bert, tiny_causal
from tests.train_helpers import PASSAGES, QUERIES, make_trainer, score, triples

COLUMNS = [[*PASSAGES[:3], PASSAGES[0]], PASSAGES[4:8]]  # one passage twice, of different lengths
PROMPT = "the passage {passage} is a teacher of {query}:"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal(tmp_path_factory.mktemp("causal"))


@cache
def loaded(path: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()


def plain(path: Path, prompt: str, *, special: bool = True, words: tuple[str, str] = ("yes", "no")) -> float:
    """One prompt alone, by plain transformers."""
    tokenizer, model = loaded(path)
    with torch.no_grad():
        logits = model(**tokenizer(prompt, add_special_tokens=special, return_tensors="pt")).logits[0, -1]
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in words)
    return float(logits[yes] - logits[no])


@pytest.mark.parametrize("candidates", ["own", "in-batch"])
def test_scores_are_those_of_a_plain_loop(path: Path, candidates: Any) -> None:
    teacher = CausalRerankerTeacher(path, prompt=PROMPT, candidates=candidates, dtype="float32")
    found = score(teacher, QUERIES[:4], COLUMNS)
    passages = [text for column in COLUMNS for text in column]
    expected = torch.tensor(
        [[plain(path, PROMPT.format(query=query, passage=text)) for text in passages] for query in QUERIES[:4]]
    )
    if candidates == "own":
        expected *= torch.eye(4).repeat(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.05
    teacher.tokens_per_pass = 64  # several passes
    torch.testing.assert_close(score(teacher, QUERIES[:4], COLUMNS), expected, atol=1e-5, rtol=1e-5)


def test_the_prompt_goes_into_the_chat_template_and_words_can_be_chosen(tmp_path: Path) -> None:
    path = tiny_causal(tmp_path, chat=True)
    teacher = CausalRerankerTeacher(path, prompt=PROMPT, yes=" is", no=" a", dtype="float32")
    said = f"<s>{PROMPT.format(query='what', passage='{query}')}</s>False"
    expected = plain(path, said, special=False, words=(" is", " a"))
    assert float(teacher.list_scores("what", ["{query}"])) == pytest.approx(expected, abs=1e-5)
    raw = CausalRerankerTeacher(path, prompt=PROMPT, chat_template=False, dtype="float32")
    expected = plain(path, PROMPT.format(query="what", passage="is"))
    assert float(raw.list_scores("what", ["is"])) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("passage", ["student " * 100, "🙂" * 60, "a" * 200])
def test_long_passages_are_cut_and_the_prompt_is_not(path: Path, passage: str) -> None:
    teacher = CausalRerankerTeacher(path, prompt=PROMPT, max_length=60, dtype="float32")
    tokenizer = teacher.tokenizer
    for query in ("what is", "dense retrieval " * 40):
        features = teacher._features([(query, passage), ("what", "is")])
        text = tokenizer.decode(features["input_ids"][0], skip_special_tokens=True)
        found = re.fullmatch("the passage (.+) is a teacher of (.+):", text)
        assert found and passage.startswith(found[1]) and query.startswith(found[2])
        assert 50 <= features["input_ids"].shape[1] <= 60
        assert float(teacher.list_scores(query, [passage])) == pytest.approx(plain(path, text), abs=1e-5)


def test_bfloat16_rounds_no_difference_of_large_logits(tmp_path: Path) -> None:
    _, model = loaded(tiny_causal(tmp_path))
    with torch.no_grad():
        model.lm_head.weight += 50
    model.save_pretrained(tmp_path)
    half, full = (CausalRerankerTeacher(tmp_path, prompt=PROMPT, dtype=dtype) for dtype in ("bfloat16", "float32"))  # type: ignore[arg-type]
    found, expected = (teacher.list_scores("what is", PASSAGES[:4]) for teacher in (half, full))
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
    assert expected.abs().max() > 0.2


def test_models_that_are_named_otherwise_judge_too(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer, _ = loaded(tiny_causal(tmp_path))
    sizes = {"n_positions": 192, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)).save_pretrained(tmp_path)
    prompt = PROMPT.format(query="what", passage="is")
    found = float(CausalRerankerTeacher(tmp_path, prompt=PROMPT, dtype="float32").list_scores("what", ["is"]))
    loaded.cache_clear()
    assert found == pytest.approx(plain(tmp_path, prompt), abs=1e-5)


def test_what_can_not_judge_is_refused(path: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"yes": "certainly"}, r"yes: 'certainly' is no single token of this model \(\['c'"),
        ({"no": "yes"}, "no: 'yes' is the same token as yes"),
        ({"prompt": "{query}"}, "prompt: it must hold {query} and {passage}, each once"),
        ({"max_length": 12}, "prompt: it takes .* of 12 tokens: shorten it, or raise max_length"),
        ({"max_length": 0}, "max_length must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            CausalRerankerTeacher(path, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is a BertModel and no causal language model: the head that chooses"):
        CausalRerankerTeacher(tiny_bert(tmp_path / "bert"))


def test_it_teaches(path: Path, student: Any, tmp_path: Path) -> None:
    teacher = CausalRerankerTeacher(path, dtype="float32")
    trainer = make_trainer(tmp_path, student, teacher, triples(16), candidates="own")
    assert trainer.train().global_step == 2
