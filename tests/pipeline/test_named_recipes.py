"""Every recipe of a named system, run for two steps on stand-ins that lie where the Hub's names point."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, IterableDataset
from sentence_transformers import SparseEncoder
from transformers import BertConfig, BertForMaskedLM

from tct_hf import SparseTCTTrainer, StoredScores, TCTTrainer
from tct_hf.encoding.build import has_tct_encoding
from tct_hf.settings import SettingsError, load_settings
from tct_hf.training.loss import coupled_part
from tct_hf.training.sparsity import RegularizerWarmup
from tests.models import tiny_bert
from tests.recipe import ROOT, in_this_process, write_beir

FOLDERS = (
    "tct_colbert-msmarco",
    "splade-cocondenser-msmarco-kldiv-minilm",
    "splade-cocondenser-kldiv-marginmse-minilm",
)
# Bases that no command names.
ABSTRACT = ("tct_colbert-msmarco/base", "tct_colbert-msmarco/triples")
TEMPERATURES = ("temperature", "student_temperature")
WEIGHTS = ("document_regularizer_weight", "query_regularizer_weight")


def splade(teacher: float = 2.0, student: float = 2.0, **more: float) -> dict[str, float]:
    """The numbers of a sparse system; the regularisers' are 3e-5 and 5e-5 over the student's temperature squared."""
    weights = (3e-5 / student**2, 5e-5 / student**2)
    shared: dict[str, float] = {"hard_label_weight": 0.0, "margin_mse_weight": 0.0, "student_divisor": 1.0}
    return {
        **shared,
        **dict(zip((*TEMPERATURES, *WEIGHTS), (teacher, student, *weights), strict=True)),
        "learning_rate": 2e-5,
        "warmup_steps": 0.1,
        **more,
    }


def tct(hard_label_weight: float) -> dict[str, float]:
    numbers = (0.25, 1.0, hard_label_weight)
    names = (*TEMPERATURES, "hard_label_weight")
    return {
        **dict(zip(names, numbers, strict=True)),
        "learning_rate": 7e-6,
        "warmup_steps": 10000,
        "weight_decay": 0.01,
    }


# One of each family and of each script.
QUICK = ("tct_colbert-msmarco/v2-HN+", "splade-cocondenser-msmarco-kldiv-minilm/temp-4-4-threshold")
# What makes each system what it is, written out once more.
SYSTEMS: dict[str, dict[str, float]] = {
    "tct_colbert-msmarco/paper": tct(0.1),
    "tct_colbert-msmarco/released-code": tct(0.0),
    "tct_colbert-msmarco/v2": tct(0.0),
    "tct_colbert-msmarco/v2-HN": {**tct(0.0), "warmup_steps": 5000},
    "tct_colbert-msmarco/v2-HN+": {**tct(0.0), "warmup_steps": 5000},
    **{
        f"splade-cocondenser-msmarco-kldiv-minilm/{name}": numbers
        for name, numbers in {
            "base": splade(),
            "temp-2-2": splade(2, 2),
            "temp-3-3": splade(3, 3),
            "temp-4-4": splade(4, 4),
            "temp-5-5": splade(5, 5),
            "temp-30-3": splade(30, 3),
            "threshold": splade(document_regularizer_threshold=200),
            "temp-4-4-threshold": splade(4, 4, document_regularizer_threshold=200),
            "threshold-student-div-30": splade(document_regularizer_threshold=200, student_divisor=30),
        }.items()
    },
    "splade-cocondenser-kldiv-marginmse-minilm/temp-4": splade(4, 4, margin_mse_weight=0.05 / 16),
}


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


@dataclass
class Ran:
    """What came of a run: the trainers in order, and what the parts around them were given."""

    settings: Any
    trainers: list[Any] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)  # what each trains on
    students: list[dict[str, Any]] = field(default_factory=list)  # how each dense one was made
    mined: list[Any] = field(default_factory=list)
    triples: list[dict[str, Any]] = field(default_factory=list)  # of the collection
    report: dict[str, Any] = field(default_factory=dict)
    collection: Any = None  # that is reported on

    @property
    def student(self) -> Any:
        return [one for one in self.trainers if isinstance(one, (TCTTrainer, SparseTCTTrainer))][-1]

    @property
    def teachers(self) -> list[Any]:
        return [one for one in self.trainers if not isinstance(one, (TCTTrainer, SparseTCTTrainer))]


@pytest.fixture
def run(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Ran]:
    """A function that runs a system's recipe, with fewer steps and rows; what is reported is not searched for."""
    from tct_hf.data.collection import Collection
    from tct_hf.pipeline import rounds
    from tct_hf.pipeline import train as pipeline
    from tct_hf.training import run as training

    monkeypatch.chdir(here)

    def call(system: str) -> Ran:
        name = "rounds" if "HN" in system else "train"
        recipe = in_this_process(ROOT / "recipes" / f"{name}.py", file_of(system), monkeypatch)
        monkeypatch.setenv("TCT_HF_CACHE", str(here / "cache"))
        options = ["--precision=fp32"]
        for part in (
            "teacher.training",
            "student.training",
            *(("later.student.training", "later.teacher.training") * (name == "rounds")),
        ):
            if not (system.startswith("splade") and part.startswith("teacher")):
                options += [f"--{part}.max_steps=2", f"--{part}.per_device_train_batch_size=4"]
        module = sys.modules[f"{name}_recipe"]
        ran = Ran(load_settings(module.Settings, [str(file_of(system)), *options], description=""))

        real_run, real_student, real_triples, real_mine = (
            training.run_stage,
            pipeline.new_student,
            pipeline.collection_triples,
            rounds.mine,
        )

        def train(make: Any, *rest: Any, **named: Any) -> Any:
            def made() -> Any:
                trainer, save = make()
                ran.trainers.append(trainer)
                ran.rows.append(trainer.train_dataset)
                return trainer, save

            return real_run(made, *rest, **named)

        def new_student(*given: Any, **named: Any) -> Any:
            ran.students.append({"initialise_from": given[1].initialise_from})
            return real_student(*given, **named)

        def triples(collection: Any, **named: Any) -> Any:
            ran.triples.append(named)
            return real_triples(collection, **named)

        def mine(collection: Any, source: Any, settings: Any, *rest: Any, **named: Any) -> Any:
            ran.mined.append(settings)
            return real_mine(collection, source, settings, *rest, **named)

        def report(*given: Any, **named: Any) -> Path:
            ran.report = named
            [ran.collection] = [one for one in given if isinstance(one, Collection)]
            text = tmp_path / "out" / "report.md"
            text.write_text("")
            return text

        monkeypatch.setattr(training, "run_stage", train)
        monkeypatch.setattr(pipeline, "new_student", new_student)
        monkeypatch.setattr(pipeline, "collection_triples", triples)
        monkeypatch.setattr(rounds, "mine", mine)
        monkeypatch.setattr(pipeline, "quick_report", report)
        monkeypatch.setattr("tct_hf.evaluation.round_report.report_rounds", report)
        assert recipe(tmp_path / "out", *options) == 0
        return ran

    return call


def regularisers(trainer: Any) -> dict[str, Any]:
    """What the regularisers of a sparse student's loss have, by the arguments' names."""
    [warmup] = [one for one in trainer.callback_handler.callbacks if isinstance(one, RegularizerWarmup)]
    assert warmup.loss is trainer.loss
    return {
        "document_regularizer_weight": warmup.max_document_regularizer_weight,
        "query_regularizer_weight": warmup.max_query_regularizer_weight,
        "document_regularizer_threshold": trainer.loss.document_regularizer.threshold,
        "query_regularizer_threshold": trainer.loss.query_regularizer.threshold,
    }


def reached(trainer: Any) -> dict[str, Any]:
    """All settings of a training as they stand where they act: the loss and the regularisers before the arguments."""
    found = dict(vars(trainer.args))
    if isinstance(trainer, (TCTTrainer, SparseTCTTrainer)):
        found |= coupled_part(trainer.loss).get_config_dict()
    if isinstance(trainer, SparseTCTTrainer):
        found |= regularisers(trainer)
    return found


def encoder_of(trainer: Any) -> Any:
    return trainer.model[0]


# Where each setting that is not the default's has to be found: name to a function of what ran.
ARRIVED: dict[str, Callable[[Ran], Any]] = {
    "data.source": lambda ran: ran.collection.name,
    "data.dev_split": lambda ran: "validation" if len(ran.collection.splits["dev"].queries) == 10 else None,
    "triples.streaming": lambda ran: isinstance(ran.rows[-1], IterableDataset),
    "triples.num_negatives": lambda ran: sum(
        name.startswith("negative") and not name.endswith("_id") for name in ran.rows[-1].column_names
    ),
    "encoder.base_model": lambda ran: encoder_of(ran.trainers[0]).model.config._name_or_path,
    "encoder.encoding": lambda ran: "tct" if has_tct_encoding(ran.student.model) else "own",
    "encoder.query_length": lambda ran: (
        (encoder_of(ran.student).query_expansion or {}).get("length") or encoder_of(ran.student).query_length
    ),
    "encoder.document_length": lambda ran: encoder_of(ran.student).document_length,
    "teacher.dim": lambda ran: ran.trainers[0].model[1].linear.out_features,
    "teacher.kind": lambda ran: {StoredScores: "stored"}.get(type(ran.student.teacher), "colbert"),
    "teacher.scores": lambda ran: ran.student.teacher.table.name,
    "student.kind": lambda ran: "splade" if isinstance(ran.student.model, SparseEncoder) else "dense",
    "student.initialise_from": lambda ran: ran.students[-1]["initialise_from"] if ran.students else "base",
    "data.negative_depth": lambda ran: ran.triples[0]["depth"],
    "variant": lambda ran: {1: "HN", 2: "HN+"}[len(ran.teachers)],
    "evaluation.measures": lambda ran: ran.report["measures"],
    "evaluation.depth": lambda ran: ran.report["depth"],
}
# Where triples and texts lie, and what the test sets itself: a run without them does not come to its end.
NEEDED = (
    "output_dir",
    "stages",
    "precision",
    "triples.path",
    "triples.config",
    "triples.queries",
    "triples.collection",
)


def differing(settings: Any, defaults: Any) -> dict[str, Any]:
    """Dotted name to value of every setting that is not the default."""

    def walk(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in one.items():
            if isinstance(value, dict):
                yield from walk(value, other.get(name) or {}, f"{prefix}{name}.")
            elif name not in other or value != other[name]:
                yield f"{prefix}{name}", value

    return dict(walk(asdict(settings), asdict(defaults), ""))


@pytest.mark.parametrize(
    "system", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in SYSTEMS]
)
def test_two_steps_of_every_system_and_each_of_its_numbers_arrives(system: str, run: Callable[[str], Ran]) -> None:
    ran = run(system)
    assert all(trainer.state.global_step == 2 for trainer in ran.trainers)
    student = reached(ran.student)
    assert {name: student[name] for name in SYSTEMS[system]} == {
        name: pytest.approx(value, rel=2e-4) for name, value in SYSTEMS[system].items()
    }
    # The last student's training, the first teacher's; of mined negatives the later ones.
    trainings = {"student.training": ran.student, "later.student.training": ran.student}
    if ran.teachers:
        trainings |= {"teacher.training": ran.teachers[0], "later.teacher.training": ran.teachers[-1]}
    later = asdict(ran.settings).get("later", {})
    for name, value in differing(ran.settings, type(ran.settings)()).items():
        section, _, key = name.rpartition(".")
        if section == "later.teacher.training" and len(ran.teachers) == 1:
            continue  # HN trains no teacher on them
        if section in trainings:
            if section == "student.training" and key in later.get("student", {}).get("training", {}):
                value = later["student"]["training"][key]
            assert reached(trainings[section])[key] == value, name
        elif name not in NEEDED:
            assert ARRIVED[name](ran) == value, name
    if ran.mined:
        assert [asdict(one) for one in ran.mined] == [asdict(ran.settings.mining)]
        assert ran.settings.mining.depth == 200 and len(ran.trainers) == 2 + len(ran.teachers)
    log = ran.student.state.log_history
    assert "train_loss" in log[-1]


def test_every_recipe_of_the_folders_is_a_system_with_a_line_in_the_readme() -> None:
    found = {f"{name}/{file.stem}" for name in FOLDERS for file in (ROOT / "recipes" / name).glob("*.yaml")}
    assert found == {*SYSTEMS, *ABSTRACT}
    readme = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    outputs = set()
    for system in SYSTEMS:
        assert f"{system}.yaml" in readme
        text = file_of(system).read_text(encoding="utf-8")
        assert f"recipes/{'rounds' if 'HN' in system else 'train'}.py recipes/{system}.yaml\n" in text
        outputs.add(yaml.safe_load(text)["output_dir"])
    assert outputs == {f"outputs/{system}" for system in SYSTEMS}


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {key: value for name, one in node.items() for key, value in leaves(one, f"{prefix}.{name}").items()}


@pytest.mark.parametrize("system", [*SYSTEMS, *ABSTRACT])
def test_a_recipe_repeats_nothing_of_what_it_extends(system: str) -> None:
    file = file_of(system)
    said = yaml.safe_load(file.read_text(encoding="utf-8"))
    own, base = leaves(said), dict[str, Any]()
    while "extends" in said:
        file = file.parent / said["extends"]
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
        base = {**leaves(said), **base}
    assert not {name for name, value in own.items() if name != ".extends" and base.get(name, file) == value}


def test_a_key_that_no_recipe_knows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = "splade-cocondenser-msmarco-kldiv-minilm/temp-4-4"
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(f"extends: {file_of(system)}\nstudent: {{training: {{teacher_temperature: 4.0}}}}\n")
    in_this_process(ROOT / "recipes" / "train.py", wrong, monkeypatch)
    with pytest.raises(SettingsError, match="teacher_temperature"):
        load_settings(sys.modules["train_recipe"].Settings, [str(wrong)], description="")
