"""Every recipe of a named system, run for two steps on stand-ins that lie where the Hub's names point."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from sentence_transformers import SparseEncoder
from transformers import BertConfig, BertForMaskedLM

from tct_hf import SparseTCTTrainer, StoredScores, TCTTrainer
from tct_hf.encoding.build import has_tct_encoding
from tct_hf.training.loss import coupled_part
from tct_hf.training.sparse_trainer import RegularizerWarmup
from tests.models import tiny_bert
from tests.recipe import ROOT, in_this_process, write_beir

FOLDERS = (
    "tct_colbert-msmarco",
    "splade-cocondenser-msmarco-kldiv-minilm",
    "splade-cocondenser-kldiv-marginmse-minilm",
)
# Bases that no command names.
ABSTRACT = ("tct_colbert-msmarco/base", "tct_colbert-msmarco/triples")


# One of each kind, with what makes it what it is; `tests/recipe_settings.json` has the settings of all of them.
TCT = {"temperature": 0.25, "student_temperature": 1.0, "learning_rate": 7e-6, "weight_decay": 0.01}
SPLADE = {"learning_rate": 2e-5, "warmup_steps": 0.1, "hard_label_weight": 0.0, "student_divisor": 1.0}
# The regularisers' weights are 3e-5 and 5e-5 over the student's temperature squared.
REGULARIZERS = {"document_regularizer_weight": 3e-5 / 16, "query_regularizer_weight": 5e-5 / 16}
FOURS = {**SPLADE, **REGULARIZERS, "temperature": 4.0, "student_temperature": 4.0}
SYSTEMS: dict[str, dict[str, float]] = {
    "tct_colbert-msmarco/v2": {**TCT, "hard_label_weight": 0.0, "warmup_steps": 10_000},
    "splade-cocondenser-msmarco-kldiv-minilm/temp-4-4-threshold": {
        **FOURS, "margin_mse_weight": 0.0, "document_regularizer_threshold": 200,
    },
    "tct_colbert-msmarco/paper": {**TCT, "hard_label_weight": 0.1, "warmup_steps": 10_000},
    "tct_colbert-msmarco/v2-HN": {**TCT, "hard_label_weight": 0.0, "warmup_steps": 5000},
    "tct_colbert-msmarco/v2-HN+": {**TCT, "hard_label_weight": 0.0, "warmup_steps": 5000},
    "splade-cocondenser-msmarco-kldiv-minilm/threshold-student-div-30": {
        **SPLADE, "document_regularizer_threshold": 200, "student_divisor": 30,
    },
    "splade-cocondenser-kldiv-marginmse-minilm/temp-4": {**FOURS, "margin_mse_weight": 0.05 / 16},
}  # fmt: skip
QUICK = [*SYSTEMS][:2]


def file_of(system: str) -> Path:
    return ROOT / "recipes" / f"{system}.yaml"


def write_tables(folder: Path, tables: Mapping[str, Dataset]) -> None:
    """A data set in the Hub's layout, one configuration a table."""
    folder.mkdir(parents=True)
    for name, table in tables.items():
        (folder / name).mkdir()
        table.to_parquet(folder / name / "train-00000-of-00001.parquet")
    configs = [{"config_name": name, "data_files": f"{name}/*.parquet"} for name in tables]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds what the recipes name, by its Hub id."""
    here = tmp_path_factory.mktemp("hub")
    patch.setattr("datasets.config.HF_DATASETS_CACHE", here / "datasets")
    tiny_bert(here / "google-bert" / "bert-base-uncased")
    base = tiny_bert(here / "Luyu" / "co-condenser-marco")
    # A sparse student's texts have 256 tokens, more than other tests' encoders take.
    BertForMaskedLM(BertConfig.from_pretrained(base, max_position_embeddings=256)).save_pretrained(base)
    tokenizer = base / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "model_max_length": 256}))
    qrels = write_beir(here / "BeIR" / "msmarco", test=3) / "qrels"
    (qrels / "dev.tsv").rename(qrels / "validation.tsv")

    queries = {str(number): f"tokens and words {number}" for number in range(16)}
    passages = {str(100 + number): f"a passage of {number} tokens and more words" for number in range(64)}
    ids = list(passages)
    triplets = {"query_id": list(queries), "positive_id": ids[:16], "negative_id": ids[16:32]}
    write_tables(
        here / "sentence-transformers" / "msmarco",
        {
            "triplets": Dataset.from_dict(triplets),
            "queries": Dataset.from_dict({"query_id": list(queries), "query": list(queries.values())}),
            "corpus": Dataset.from_dict({"passage_id": ids, "passage": list(passages.values())}),
        },
    )
    mined: dict[str, list[int]] = {"query": [int(query) for query in queries], "positive": list(range(100, 116))}
    mined |= {f"negative_{at}": [100 + (row + at) % 64 for row in range(16)] for at in range(1, 51)}
    write_tables(
        here / "sentence-transformers" / "msmarco-co-condenser-margin-mse-sym-mnrl-mean-v1",
        {"triplet-50-ids": Dataset.from_dict(mined)},
    )
    lists = [[100 + (row + at) % 64 for at in range(51)] for row in range(16)]
    scores = [[10.0 - 0.1 * at - row for at in range(51)] for row in range(16)]
    write_tables(
        here / "sentence-transformers" / "msmarco-scores-ms-marco-MiniLM-L6-v2",
        {"list": Dataset.from_dict({"query_id": mined["query"], "corpus_id": lists, "score": scores})},
    )
    yield here


@pytest.fixture
def run(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """A function that runs a system's recipe, with fewer steps and rows, to its trainers; nothing is reported."""
    from tct_hf.training.stages import Stage

    monkeypatch.chdir(here)

    def call(system: str) -> list[Any]:
        name = "rounds" if "HN" in system else "train"
        recipe = in_this_process(name, file_of(system), monkeypatch)
        monkeypatch.setenv("TCT_HF_CACHE", str(here / "cache"))
        parts = ["student"] if system.startswith("splade") else ["student", "teacher"]
        parts += ["later.student", "later.teacher"] if name == "rounds" else []
        fewer = ("max_steps=2", "per_device_train_batch_size=4")
        trainers: list[Any] = []
        train_stage = Stage.train

        def train(stage: Any, make: Any) -> Any:
            return train_stage(stage, lambda: trainers.append(make()) or trainers[-1])

        def report(*given: Any, **named: Any) -> Path:
            (tmp_path / "out" / "report.md").write_text("")
            return tmp_path / "out" / "report.md"

        monkeypatch.setattr(Stage, "train", train)
        monkeypatch.setattr("tct_hf.pipeline.train.quick_report", report)
        monkeypatch.setattr("tct_hf.evaluation.training_reports.report_rounds", report)
        options = [f"--{part}.training.{setting}" for part in parts for setting in fewer]
        recipe(tmp_path / "out", "--precision=fp32", *options)
        return trainers

    return call


def reached(trainer: Any) -> dict[str, Any]:
    """All settings of a training as they stand where they act: the loss and the regularisers before the arguments."""
    found = dict(vars(trainer.args))
    if isinstance(trainer, (TCTTrainer, SparseTCTTrainer)):
        found |= coupled_part(trainer.loss).get_config_dict()
    if isinstance(trainer, SparseTCTTrainer):
        [warmup] = [one for one in trainer.callback_handler.callbacks if isinstance(one, RegularizerWarmup)]
        assert warmup.loss is trainer.loss
        for side in ("document", "query"):
            found[f"{side}_regularizer_weight"] = getattr(warmup, f"max_{side}_regularizer_weight")
            found[f"{side}_regularizer_threshold"] = getattr(trainer.loss, f"{side}_regularizer").threshold
    return found


@pytest.mark.parametrize(
    "system", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in SYSTEMS]
)
def test_two_steps_of_every_system_and_each_of_its_numbers_arrives(system: str, run: Callable[[str], Any]) -> None:
    trainers = run(system)
    assert all(trainer.state.global_step == 2 for trainer in trainers)
    students = [one for one in trainers if isinstance(one, (TCTTrainer, SparseTCTTrainer))]
    teachers = {"splade": 0, "v2-HN+": 2}.get(system.rpartition("/")[2] if "HN" in system else system[:6], 1)
    assert (len(students), len(trainers)) == (1 + ("HN" in system), 1 + ("HN" in system) + teachers)
    found, model = reached(students[-1]), students[-1].model
    assert {name: found[name] for name in SYSTEMS[system]} == {
        name: pytest.approx(value, rel=2e-4) for name, value in SYSTEMS[system].items()
    }
    sparse = system.startswith("splade")
    assert isinstance(model, SparseEncoder) is sparse is isinstance(students[-1].teacher, StoredScores)
    assert sparse or has_tct_encoding(model)


def test_every_named_system_has_its_own_output_and_a_line_in_the_docs() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    systems = [f"{name}/{file.stem}" for name in FOLDERS for file in (ROOT / "recipes" / name).glob("*.yaml")]
    for system in sorted({*systems} - {*ABSTRACT}):
        assert f"{system}.yaml" in page
        text = file_of(system).read_text(encoding="utf-8")
        assert f"recipes/{'rounds' if 'HN' in system else 'train'}.py recipes/{system}.yaml\n" in text
        assert yaml.safe_load(text)["output_dir"] == f"outputs/{system}"
