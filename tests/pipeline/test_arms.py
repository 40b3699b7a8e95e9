"""An arm says what its students learn from, and everything else is the same for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tct_hf import ColBERTTeacher, NoTeacher
from tct_hf.data.collection import Collection, load_collection
from tct_hf.pipeline.arms import HARD, IN_BATCH, OWN, STOCK, Arm, ArmTable, check_arms, check_students, train_arm
from tct_hf.pipeline.steps import DataSettings, EncoderSettings
from tct_hf.pipeline.teacher import TeacherSettings
from tct_hf.settings import SettingsError
from tct_hf.training import run as training
from tests.models import tiny_bert, tiny_colbert
from tests.recipe import write_beir


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arms")
    tiny_bert(path / "base", layers=3)
    tiny_colbert(path / "teacher", layers=3)
    write_beir(path / "beir", passages=20, train=8, dev=3, test=4)
    return path


@pytest.fixture
def collection(material: Path, monkeypatch: pytest.MonkeyPatch) -> Collection:
    monkeypatch.setenv("TCT_HF_CACHE", str(material / "cache"))
    return load_collection(str(material / "beir"))


@pytest.fixture
def asked(material: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains an arm up to the call that would train the student, and returns what that was given."""

    def call(arm: Arm, seed: int = 5, **shared: Any) -> dict[str, Any]:
        given: dict[str, Any] = {}

        def record(student: Any, teacher: Any, triples: Any, final: Path, **rest: Any) -> Path:
            given.update(student=student, teacher=teacher, triples=triples, final=final, **rest)
            return final

        with monkeypatch.context() as patch:
            patch.setattr(training, "train_student", record)
            train_arm(
                arm,
                seed,
                material / "arm",
                collection=collection,
                data=DataSettings(labels=0.5, negative_depth=10),
                encoder=EncoderSettings(str(material / "base"), encoding="tct", query_length=16, document_length=48),
                teacher=str(material / "teacher" / "colbert"),
                dtype="float32",
                training={"seed": 1, "max_steps": 4, "hard_label_weight": 0.3, "candidates": "own", **shared},
                curve={"queries": 2, "passages": 9},
                settings={"corpus": "x"},
            )
        return given

    return call


@pytest.mark.parametrize(
    ("signal", "weight", "candidates"), [(HARD, 1.0, "own"), (OWN, 0.3, "own"), (IN_BATCH, 0.3, "in-batch")]
)
def test_the_signal_decides_what_no_shared_argument_can_change(
    asked: Any, signal: Any, weight: float, candidates: str
) -> None:
    given = asked(Arm(signal=signal))
    arguments = given["arguments"]
    assert (arguments["hard_label_weight"], arguments["candidates"]) == (weight, candidates)
    assert (arguments["seed"], arguments["max_steps"]) == (5, 4)
    teacher = given["teacher"]()
    assert isinstance(teacher, NoTeacher if signal == HARD else ColBERTTeacher)


def test_a_stock_arm_trains_the_base_as_it_is_with_the_steps_and_batches_of_all(
    material: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def record(model: Any, triples: Any, final: Path, **rest: Any) -> Path:
        given.update(model=model, triples=triples, **rest)
        return final

    monkeypatch.setattr(training, "train_stock", record)
    arm = Arm(signal=STOCK)
    train_arm(
        arm,
        5,
        material / "stock",
        collection=collection,
        data=DataSettings(labels=0.5, negative_depth=10),
        encoder=EncoderSettings(base_model=str(material / "base"), query_length=16, document_length=48),
        teacher="never/opened",
        dtype="float32",
        training={"max_steps": 4},
        curve={"queries": 2, "passages": 9},
        settings={"corpus": "x"},
    )
    assert (given["arguments"]["seed"], given["arguments"]["max_steps"], arm.initialise_from) == (5, 4, "base")
    assert given["model"]().prompts == {"query": "", "document": ""} and len(given["triples"]()) == 4
    with pytest.raises(ValueError, match="labels are all that signal gives"):
        Arm(signal=STOCK, unlabelled=True)


def test_an_arms_own_arguments_win(asked: Any) -> None:
    arguments = asked(Arm(training={"max_steps": 9, "temperature": 2.0}), save_steps=7)["arguments"]
    assert (arguments["max_steps"], arguments["temperature"], arguments["save_steps"]) == (9, 2.0, 7)


def test_rows_are_labelled_as_the_share_says_and_unlabelled_only_where_the_arm_asks(asked: Any) -> None:
    plain = asked(Arm())["triples"]()
    assert len(plain) == 4 and "labelled" not in plain.column_names
    rows = asked(Arm(unlabelled=True))["triples"]()
    assert len(rows) == 8 and sum(rows["labelled"]) == 4
    assert [row["query_id"] for row in rows if row["labelled"]] == plain["query_id"][:]


@pytest.mark.parametrize("source", ["teacher", "base"])
def test_a_student_starts_from_the_encoder_and_the_layers_named(material: Path, asked: Any, source: Any) -> None:
    import torch
    from transformers import AutoModel

    student = asked(Arm(initialise_from=source, layers=[0, 2]))["student"]()
    assert student[0].model.config.num_hidden_layers == 2
    folder = material / "base" if source == "base" else material / "teacher" / "colbert"
    weights = AutoModel.from_pretrained(folder).encoder.layer[2].output.dense.weight
    torch.testing.assert_close(student[0].model.encoder.layer[1].output.dense.weight.cpu(), weights)
    assert student.prompts == {"query": "[Q] ", "document": "[D] "}


def test_a_student_reads_texts_as_its_arm_says(asked: Any) -> None:
    own = {"query_augmentation": False, "pooling": "cls", "scale": 20.0, "encoder": {"document_length": 24}}
    plain, other = asked(Arm())["student"](), asked(Arm(**own))["student"]()
    assert plain[0].query_expansion is not None and other[0].query_expansion is None
    assert (plain[0].document_length, other[0].document_length) == (48, 24)
    assert (plain[1].pooling_mode, other[1].pooling_mode) == ("mean", "cls")
    assert len(other) > len(plain) == 2  # normalised and scaled
    assert (
        Arm(**own).reads() == "no [MASK]s, start token's vector, normalised, document_length 24" and not Arm().reads()
    )


def test_settings_that_came_later_leave_students_that_were_trained_before_theirs() -> None:
    before = {"signal": "in-batch", "initialise_from": "teacher", "layers": None, "unlabelled": False, "training": {}}
    assert Arm(initialise_from="teacher").depends(5, {})["arm"] == before
    assert Arm(initialise_from="teacher", pooling="cls").depends(5, {})["arm"] == {**before, "pooling": "cls"}


def test_an_arm_that_starts_from_the_teacher_has_no_base_of_its_own() -> None:
    with pytest.raises(ValueError, match="base_model is not what it starts from; set initialise_from to base"):
        Arm(encoder={"base_model": "x"}, initialise_from="teacher")
    assert (
        Arm(encoder={"base_model": "x"}, initialise_from="base").encoder_settings(EncoderSettings()).base_model == "x"
    )


def test_students_that_cannot_be_built_are_found_before_any_training(material: Path) -> None:
    encoder, teacher = EncoderSettings(str(material / "base"), encoding="tct"), TeacherSettings()
    fine = {"half": Arm(layers=[0, 2], encoder={"query_length": 12})}
    check_students(fine, encoder, teacher)
    for wrong, message in (
        ({"layers": [3]}, r"^arms\.wrong\.layers: there is no layer 3"),
        ({"scale": -1.0}, r"^arms\.wrong\.scale"),
        ({"encoder": {"prompts": {"query": "q "}}}, r"^arms\.wrong\.encoder\.prompts"),
        ({"training": {"matryoshka_dims": [999]}}, r"^arms\.wrong\.training\.matryoshka_dims: 999"),
    ):
        with pytest.raises(SettingsError, match=message):
            check_students({**fine, "wrong": Arm(**wrong)}, encoder, teacher)


def test_a_table_tests_its_arms_against_what_it_says_or_else_what_they_say() -> None:
    arms = {"a": Arm(against=["b", "bm25", "gone"]), "b": Arm(), "c": Arm(against=["a"])}
    there = [*arms, "bm25"]
    assert ArmTable(["a", "b", "gone"]).pairs(arms, there) == [("a", "b"), ("a", "bm25")]
    assert ArmTable(["c", "a", "b"], against=["a"]).pairs(arms, there) == [("c", "a"), ("b", "a")]


def test_dev_figures_during_training_are_of_a_part_and_only_where_asked_for(asked: Any) -> None:
    assert asked(Arm())["evaluator"] is None
    evaluator = asked(Arm(), eval_strategy="steps")["evaluator"]
    assert len(evaluator.queries) == 2 and len(evaluator.corpus) == 9


def test_students_depend_on_all_but_what_they_are_compared_with(asked: Any) -> None:
    arm = Arm(layers=[1], against=["other"], seeds=[5, 6], training={"temperature": 2.0})
    given = asked(arm)["settings"]
    assert (
        given
        == arm.depends(5, {"corpus": "x"})
        == Arm(layers=[1], training={"temperature": 2.0}).depends(5, {"corpus": "x"})
    )
    assert given["corpus"] == "x" and given["seed"] == 5 and given["arm"]["layers"] == [1]
    for other in (Arm(layers=[0]), Arm(layers=[1], signal=OWN), Arm(layers=[1], unlabelled=True)):
        assert other.depends(5, {"corpus": "x"})["arm"] != given["arm"]


def test_unlabelled_rows_for_hard_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="rows without one teach nothing"):
        Arm(signal=HARD, unlabelled=True)


@pytest.mark.parametrize(
    ("signal", "name", "says"),
    [(IN_BATCH, "seed", "seeds"), (OWN, "candidates", "signal"), (HARD, "hard_label_weight", "signal")],
)
def test_an_arms_own_arguments_cannot_change_what_it_is(signal: Any, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"training: {name} is what {says} says; leave it out"):
        Arm(signal=signal, training={name: 1})
    Arm(signal=IN_BATCH, training={"hard_label_weight": 0.5})


def test_what_would_stop_an_arm_after_the_teachers_training_is_found_before(collection: Collection) -> None:
    curve = {"queries": 2, "passages": 9}
    arms = {"fine": Arm(), "wrong": Arm(training={"temperature": 0.0})}
    check_arms({"fine": Arm()}, collection, {"eval_strategy": "steps", "eval_steps": 2}, curve)
    with pytest.raises(ValueError, match=r"arms\.wrong: temperature"):
        check_arms(arms, collection, {}, curve)
    with pytest.raises(ValueError, match=r"arms\.fine: A part of 1 passages .*curve\.passages"):
        check_arms({"fine": Arm()}, collection, {"eval_strategy": "steps"}, {"queries": 3, "passages": 1})
    del collection.splits["dev"]
    with pytest.raises(ValueError, match=r"curve\.steps asks for dev figures.*set data\.dev_share"):
        check_arms({"fine": Arm()}, collection, {"eval_strategy": "steps"}, curve)
    check_arms({"fine": Arm()}, collection, {}, curve)
