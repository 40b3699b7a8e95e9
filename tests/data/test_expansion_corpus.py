"""Queries generated for a corpus: the same in any split of the work, drawn as the model says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from tct_hf import expand_corpus, expanded_texts, load_expander, load_expansions
from tct_hf.data import expander
from tct_hf.data.expander import Sampling, generate_queries, sample, uniform_numbers
from tests.encode_worker import passages
from tests.models import tiny_bert, tiny_t5
from tests.rows import content

COUNT = 23


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_t5(tmp_path_factory.mktemp("t5") / "t5"))


@pytest.fixture(scope="module")
def model(name: str) -> tuple[Any, Any]:
    return load_expander(name, dtype="float32")


def expand(model: tuple[Any, Any], folder: Path, corpus: Any = None, **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"num_queries": 4, "top_k": 5, "max_length": 9, "shard_size": 5, "tokens_per_pass": 200}
    settings = {**settings, "tokenizer": model[1], "write": lambda line: None, **more}
    return expand_corpus(model[0], passages() if corpus is None else corpus, folder, **settings)


def queries(folder: Path) -> list[list[str]]:
    return list(load_expansions(folder)["queries"])


def generate(model: tuple[Any, Any], texts: list[tuple[str, str]], **more: Any) -> list[list[str]]:
    settings: dict[str, Any] = {"num_queries": 4, "top_k": 5, "max_length": 9, "passage_length": 64}
    sampling = Sampling(**{**settings, "prompt": "", "seed": 13, "tokens_per_pass": 400, **more})
    return generate_queries(*model, texts, sampling)


@pytest.fixture(scope="module")
def whole(model: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expansion that no test changes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    expand(model, folder)
    return folder


def test_each_passage_has_its_queries_in_the_corpus_s_order(whole: Path) -> None:
    found = load_expansions(whole)
    assert list(found["id"]) == [f"p{row}" for row in range(COUNT)]
    flat = [query for row in found["queries"] for query in row]
    assert len(flat) == 4 * COUNT and len(set(flat)) > COUNT and {len(q.split()) for q in flat} > {2, 3}
    assert next(expanded_texts(passages(), found, num_queries=1)).endswith(found[0]["queries"][0])


def test_any_split_of_the_work_gives_the_same_queries(model: tuple[Any, Any], whole: Path, tmp_path: Path) -> None:
    expected = queries(whole)
    limits: tuple[dict[str, int], ...] = (
        {"tokens_per_pass": 30}, {"tokens_per_pass": 100_000, "shard_size": 23}, {"num_queries": 2},
    )  # fmt: skip
    for number, more in enumerate(limits):
        expand(model, tmp_path / str(number), **more)
        assert queries(tmp_path / str(number)) == [row[: more.get("num_queries", 4)] for row in expected]
    # A part of the corpus, in another order: a passage's own id decides.
    part = [(row["id"], row["text"]) for row in passages()][::-3]
    assert generate(model, part) == [expected[int(name[1:])] for name, _ in part]
    expand(model, tmp_path / "seed", seed=14)
    assert queries(tmp_path / "seed") != expected
    assert [len(row) for row in generate(model, [("a", " "), ("b", "what is"), ("c", "")])] == [0, 4, 0]


def test_what_is_drawn_follows_the_model_s_probabilities(model: tuple[Any, Any]) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, 2.5, -1.0]]).repeat(20_000, 1)
    uniform = torch.from_numpy(uniform_numbers(3, "p", 20_000, 1)[:, 0])
    drawn = Counter(sample(logits, uniform, top_k=4).tolist())
    kept = np.exp([3.0, 1.0, 2.0, 2.5]) / np.exp([3.0, 1.0, 2.0, 2.5]).sum()
    assert set(drawn) == {1, 2, 3, 4}
    np.testing.assert_allclose([drawn[token] / 20_000 for token in (1, 2, 3, 4)], kept, atol=0.012)
    assert set(sample(logits[:9], uniform[:9], top_k=100).tolist()) <= set(range(6))
    # The first words of many queries, against the model's own probabilities of them.
    encoder, tokenizer = model
    text = "what is dense retrieval of a passage"
    [drawn_queries] = generate(model, [("p", text)], num_queries=3000, max_length=1)
    words = Counter((query.split() or [""])[0] for query in drawn_queries)
    inputs = tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        logits = encoder(**inputs, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, -1]
    top = logits.topk(5)
    for token, share in zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True):
        word = tokenizer.decode([token], skip_special_tokens=True)
        if word:
            assert words[word] / 3000 == pytest.approx(share, abs=0.03)


def tiny_bart(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    parts = {"layers": 1, "attention_heads": 2, "ffn_dim": 64}
    sizes = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in parts.items()}
    sizes |= {"vocab_size": len(tokenizer), "d_model": 32, "max_position_embeddings": 80}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1}
    config = BartConfig(**sizes, init_std=0.4, forced_eos_token_id=1, **ids)
    bart = BartForConditionalGeneration(config).eval()
    bart.generation_config.update(max_length=20, num_beams=4, early_stopping=True)  # as published ones
    return bart


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_without_chance_it_writes_what_generate_writes(model: tuple[Any, Any], family: str) -> None:
    writer = model if family == "t5" else (tiny_bart(model[1]), model[1])
    texts = [(row["id"], row["text"]) for row in passages()]
    written = generate(writer, texts, num_queries=1, top_k=1, max_length=7)
    inputs = writer[1]([text for _, text in texts], padding=True, return_tensors="pt")
    alone = {"do_sample": False, "num_beams": 1, "early_stopping": False, "max_new_tokens": 7}
    tokens = writer[0].generate(**inputs, **alone)
    expected = [text.strip() for text in writer[1].batch_decode(tokens, skip_special_tokens=True)]
    assert [row[0] for row in written] == expected and len(set(expected)) > 1
    assert generate(writer, texts) == generate(writer, texts, tokens_per_pass=60)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(model: tuple[Any, Any], whole: Path, tmp_path: Path) -> None:
    def stopping() -> Iterator[dict[str, str]]:
        yield from list(passages())[:12]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        expand(model, tmp_path, stopping())
    assert sorted(file.name for file in tmp_path.glob("*.arrow")) == ["00000.arrow", "00001.arrow"]
    expand(model, tmp_path)
    assert content(tmp_path) == content(whole)


def test_a_folder_of_another_corpus_model_or_setting_is_refused(name: str, model: Any, whole: Path) -> None:
    other = load_expander(name, dtype="float32")
    with torch.no_grad():
        other[0].shared.weight[3] += 1
    for writer, corpus, more, message in (
        (model, None, {"num_queries": 5}, "num_queries = 4, but now num_queries = 5"),
        (model, list(passages())[:5], {}, r"made of another corpus .this one has 5 passages"),
        (other, None, {}, "weights_sha256"),
    ):
        with pytest.raises(ValueError, match=message):
            expand(writer, whole, corpus, **more)


def test_wrong_arguments_and_passages_are_one_message(model: tuple[Any, Any], tmp_path: Path) -> None:
    for more, message in (
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"tokens_per_pass": 0}, "tokens_per_pass must be at least 1"),
        ({"corpus": []}, "the corpus or the rows are empty"),
        ({"corpus": [{"id": None, "text": "x"}]}, "passage number 0 .id None., column 'id': no id"),
    ):
        with pytest.raises(ValueError, match=message):
            expand(model, tmp_path / "out", **more)
    with pytest.raises(ValueError, match="no seq2seq model"):
        load_expander(str(tiny_bert(tmp_path / "bert")))
    with pytest.raises(ValueError, match="tokenizer: give that of the model"):
        expand_corpus(model[0], passages(), tmp_path / "out")
    assert not list(tmp_path.glob("out/*.arrow"))


def test_a_named_model_runs_on_the_accelerator(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Mock(side_effect=lambda name, *, dtype, device: load_expander(name, dtype=dtype))
    monkeypatch.setattr(expander, "load_expander", load)
    monkeypatch.setattr("tct_hf.data.expander.get_device_name", lambda: "cuda")
    alone = SimpleNamespace(process_index=0, num_processes=1, device="cpu", wait_for_everyone=lambda: None)
    for number, state in enumerate((None, alone)):
        more: Any = {"num_queries": 1, "max_length": 2, "state": state, "write": lambda line: None}
        expand_corpus(name, list(passages())[:2], tmp_path / str(number), **more)
    assert [str(call.kwargs["device"]) for call in load.call_args_list] == ["cuda", "cpu"]


def test_random_numbers_are_of_the_passage_alone_and_single_precision_draws_the_same() -> None:
    wide, narrow = uniform_numbers(1, "p", 8, 5), uniform_numbers(1, "p", 3, 5)
    np.testing.assert_array_equal(wide[:3], narrow)
    assert not np.isin(wide, [uniform_numbers(1, "q", 8, 5), uniform_numbers(2, "p", 8, 5)]).any()
    assert wide.min() >= 0 and wide.max() < 1 and len(np.unique(wide)) == 40
    logits = torch.randn(500, 30, generator=torch.Generator().manual_seed(1))
    uniform = torch.from_numpy(uniform_numbers(3, "p", 500, 1)[:, 0])
    assert torch.equal(sample(logits, uniform, 10), sample(logits, uniform.float(), 10))
    assert sample(logits, uniform.new_ones(500).float(), 10).max() < 30  # a number that was rounded up to 1
