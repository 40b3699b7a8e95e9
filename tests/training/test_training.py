from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tct_hf import ColBERTTeacher, TCTTrainingArguments, build_colbert, build_student
from tct_hf.data.collection import Collection, load_collection
from tct_hf.data.near_duplicates import text_key
from tct_hf.training import stages
from tct_hf.training.run import dev_evaluator, train_colbert, train_stock, train_student
from tct_hf.training.stages import Stage, StepLines, precision
from tests.models import load_colbert, tiny_bert, tiny_colbert
from tests.recipe import write_beir
from tests.train_helpers import make_models, make_splade, make_stage, triples

ARGUMENTS: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 3, "save_steps": 1, "learning_rate": 1e-3}
SEED = {"seed": 3}
ARGUMENTS |= SEED


def losses_of(final: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((final / "training_log.json").read_text()) if "loss" in entry]


def never() -> Any:
    raise AssertionError("made although there is nothing to train")


def test_a_trained_teacher_is_published_whole_and_a_finished_one_makes_nothing(tmp_path: Path) -> None:
    base, said = str(tiny_bert(tmp_path / "base")), []

    def make() -> Any:
        return build_colbert(base, encoding="tct", dim=8, query_length=16, document_length=64)

    stage = make_stage(tmp_path, arguments=ARGUMENTS, settings=SEED, write=said.append)
    final = train_colbert(stage, make, triples, scale=4.0)
    assert final == tmp_path / "final"
    assert ColBERTTeacher(str(final), dtype="float32").training_scale == 4.0
    log = json.loads((final / "training_log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    assert log[-1].keys() == {"step", "seconds"} and log[-1]["step"] == 3 and log[-1]["seconds"] > 0
    assert json.loads((final / "tct_settings.json").read_text()) == {"seed": 3}
    assert len(said) == 3 and "step     3 of 3" in said[2]
    assert sorted(entry.name for entry in (tmp_path / "work").iterdir()) == ["tct_settings.json", "training_log.json"]
    before = (final / "model.safetensors").stat().st_mtime_ns
    assert train_colbert(stage, never, never) == final
    assert (final / "model.safetensors").stat().st_mtime_ns == before
    for folder in ("final", "work"):
        with pytest.raises(ValueError, match=f"{folder} holds a run with seed = 3, but now seed = 4"):
            train_colbert(make_stage(tmp_path, arguments=ARGUMENTS, settings={"seed": 4}), never, never)
        shutil.rmtree(tmp_path / "final", ignore_errors=True)


@pytest.fixture
def collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collection:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))
    return load_collection(str(write_beir(tmp_path / "beir", passages=20, train=2, dev=6, test=4)))


def test_a_dev_evaluator_takes_the_dev_queries_with_their_answers(collection: Collection) -> None:
    found = dev_evaluator(collection, "dense")
    assert found.queries == list(collection.splits["dev"].queries.values()) and len(found.corpus) == 20
    assert {passage for passages in found.relevant_docs.values() for passage in passages} <= set(found.corpus_ids)


@pytest.mark.parametrize("kind", ["dense", "late interaction", "sparse"])
def test_dev_is_encoded_in_the_precision_of_training(collection: Collection, tmp_path: Path, kind: Any) -> None:
    model: Any
    if kind == "late interaction":
        model = load_colbert(tiny_colbert(tmp_path))
    else:
        model = make_splade(tmp_path) if kind == "sparse" else make_models(tmp_path)[0]
    vectors, measured = [], []
    for bf16 in (False, True):
        evaluator = dev_evaluator(collection, kind, bf16=bf16)
        found = evaluator.embed_inputs(model, ["dense tokens"], encode_fn_name="query")
        vectors.append(torch.as_tensor(found[0].to_dense() if kind == "sparse" else found[0]))
        measured.append(evaluator(model)[f"dev_{'maxsim' if kind == 'late interaction' else 'dot'}_mrr@10"])
    assert vectors[0].dtype == vectors[1].dtype == torch.float32
    assert not torch.equal(vectors[0], vectors[1])
    torch.testing.assert_close(vectors[0], vectors[1], atol=0.05, rtol=0.05)
    assert all(0 < value <= 1 for value in measured)


@pytest.mark.parametrize(
    ("ids", "sampler"), [(True, "no_duplicates"), (False, "no_duplicates"), (True, "no_duplicates_hashed")]
)
def test_known_positives_are_in_no_batch_of_their_query_and_no_negatives_of_it(
    tmp_path: Path, ids: bool, sampler: str
) -> None:
    # The third negative is its own positive, the fourth a known positive, the fifth the query; the last has no label.
    known = [["a", "b"], ["b"], ["c"], ["d", "g"], ["e"], ["f"]]
    rows: dict[str, Any] = {"query": list("123456"), "positive": list("abcdef"), "negative": list("xyzg5w")}
    rows["negative"][2] = "c"
    if ids:
        rows |= {f"{name}_id": [f"id {one}" for one in rows[name]] for name in ("positive", "negative")}
        rows["known_positive_ids"] = [[f"id {one}" for one in of] for of in known]
    else:
        rows["known_positives"] = [[text_key(one) for one in of] for of in known]
    rows["labelled"] = [True] * 5 + [False]
    said: list[str] = []
    batches: list[set[str]] = []
    model = SentenceTransformer(str(tiny_bert(tmp_path / "base")), device="cpu")
    preprocess = model.preprocess

    def seen(texts: list[str], *args: Any, **kwargs: Any) -> Any:
        batches.append(set(texts))
        return preprocess(texts, *args, **kwargs)

    model.preprocess = seen
    arguments = {**ARGUMENTS, "max_steps": 2, "per_device_train_batch_size": 2, "batch_sampler": sampler}
    stage = make_stage(tmp_path, arguments=arguments, write=said.append)
    train_stock(stage, lambda: model, lambda: Dataset.from_dict(rows))
    assert "  3 of 5 rows are left out: a negative of theirs is their query or a positive of it" in said
    assert {"1"} in batches and {"2"} in batches  # the card reads all rows at once


def test_stock_training_is_cross_entropy_of_cosines_times_twenty_over_the_batch(tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_bert(tmp_path / "base")), device="cpu")
    rows = triples(8).add_column("labelled", [True] * 4 + [False] * 4)  # type: ignore[call-arg]
    texts = [rows[name][:4] for name in ("query", "positive", "negative")]
    queries, *passages = (model.encode(one, convert_to_tensor=True, normalize_embeddings=True) for one in texts)
    expected = torch.nn.functional.cross_entropy(20 * queries @ torch.cat(passages).T, torch.arange(4))
    arguments = {**ARGUMENTS, "max_steps": 1, "per_device_train_batch_size": 4, "batch_sampler": "batch_sampler"}
    arguments |= {"hard_label_weight": 0.3, "push_to_hub": True}  # of other stages
    final = train_stock(make_stage(tmp_path, arguments=arguments), lambda: model, lambda: rows)
    assert losses_of(final) == [pytest.approx(float(expected), rel=1e-3)]


def test_step_lines_tell_loss_parts_and_time_left() -> None:
    said: list[str] = []
    now = [0.0]
    lines = StepLines(said.append, clock=lambda: now[0])
    state = SimpleNamespace(global_step=20, max_steps=100, is_world_process_zero=True, log_history=[{"elapsed": 5.0}])
    lines.on_train_begin(None, state, None)
    now[0], state.global_step = 60.0, 40  # 20 steps a minute since the start
    state.log_history.append({"loss": 1.5})
    lines.on_log(None, state, None, logs={"loss": 1.5})
    assert state.log_history == [{"elapsed": 5.0}, {"loss": 1.5, "elapsed": 65.0}]  # over all interruptions
    parts = {"loss": 0.5, "hard_label": 0.2, "distillation": 0.2, "embedding": 0.1, "top_agreement": 0.256}
    lines.on_log(None, state, None, logs=parts)
    lines.on_log(None, state, None, logs={"loss": 0.5, "hard_label": 0.0, "distillation": 0.0, "embedding": 0.5})
    lines.on_log(None, state, None, logs={"eval_loss": 1.0})
    lines.on_log(None, SimpleNamespace(**{**vars(state), "is_world_process_zero": False}), None, logs=parts)
    assert said == [
        "  goes on after step 20 of 100",
        "  step    40 of 100   loss 1.500   3 min left",
        "  step    40 of 100   loss 0.500 (hard labels 0.200, distillation 0.200, vectors 0.100, agreement with "
        "the teacher 26%)   3 min left",
        "  step    40 of 100   loss 0.500 (hard labels 0.000, distillation 0.000, vectors 0.500)   3 min left",
    ]


def test_bars_are_shown_where_they_are_wanted_and_a_tracker_gets_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tracked: dict[str, float] = {}

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            tracked.update(logs)

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mine", Tracker)
    base = str(tiny_bert(tmp_path / "base"))
    arguments = {**ARGUMENTS, "max_steps": 2, "per_device_train_batch_size": 4, "report_to": "mine"}
    said: list[str] = []
    stage = make_stage(tmp_path, arguments={**arguments, "disable_tqdm": False}, write=said.append)
    train_student(stage, lambda: build_student(base), lambda: ColBERTTeacher(build_colbert(base)), lambda: triples(8))
    _, err = capfd.readouterr()
    assert "2/2" in err and "{'loss'" not in err and len(said) == 2
    assert {"loss", "grad_norm", "learning_rate", "hard_label", "distillation", "teacher_entropy"} < tracked.keys()
    monkeypatch.setattr("sys.stderr", io.StringIO())  # no terminal
    assert make_stage(tmp_path, arguments={}).args(TCTTrainingArguments).disable_tqdm
    with pytest.raises(ValueError, match=r"training\.report_to: nothing is not supported"):
        make_stage(tmp_path, arguments={"report_to": "nothing"}).args(TCTTrainingArguments)


def test_precision_follows_the_choice_and_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert precision("bf16", cpu) == {"bf16": True, "use_cpu": True}
    assert precision("fp32", torch.device("cuda")) == {"bf16": False, "use_cpu": False}
    for has in (True, False):
        monkeypatch.setattr(stages, "has_bfloat16", lambda device, has=has: has)
        assert precision("auto", cpu) == {"bf16": has, "use_cpu": True}


def test_arguments_that_the_stage_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.output_dir is set by the stage itself"):
        Stage(tmp_path, tmp_path, settings={}, arguments={"output_dir": "x"}).args(dict)
