"""A student's files: mended by finalise_checkpoint, judged by validate_checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from transformers import AutoTokenizer

from tct_hf import build_student, finalise_checkpoint, save_student, validate_checkpoint
from tct_hf.encoding import checkpoint as checkpoints
from tests.models import (
    pylate_colbert,
    stanford_colbert,
    tiny_bert,
    tiny_colbert,
    tiny_distilbert,
    tiny_modernbert,
    tiny_mpnet,
    tiny_roberta,
)

PROMPTS = {"query": "query: ", "document": "passage: "}
KINDS = ["mpnet", "plain", "cls", "bf16", "scaled", "distilbert", "modernbert", "prompted", "roberta", "dense"]


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    bert, mpnet = str(tiny_bert(root / "bert-base")), str(tiny_mpnet(root / "mpnet-base"))
    modern = str(tiny_modernbert(root / "modernbert-base"))
    built = {
        "bert": build_student(bert, encoding="tct", document_length=40),
        "mpnet": build_student(mpnet, encoding="tct", document_length=40),
        "plain": build_student(bert, encoding="tct", document_length=40, query_augmentation=False),
        "cls": build_student(bert, encoding="tct", document_length=40, pooling="cls"),
        "bf16": build_student(bert, encoding="tct", document_length=40, dtype="bfloat16"),
        "scaled": build_student(bert, encoding="tct", document_length=40, scale=20.0),
        "distilbert": build_student(
            str(tiny_distilbert(root / "distilbert-base")), encoding="tct", document_length=40, layers=[1]
        ),
        "modernbert": build_student(modern, document_length=40),
        "prompted": build_student(
            modern, query_length=16, document_length=40, prompts=PROMPTS, pooling="cls", layers=[0, 2]
        ),
        "roberta": build_student(str(tiny_roberta(root / "roberta-base")), document_length=40),
        "dense": SentenceTransformer(modules=[*build_student(bert, document_length=40), Dense(32, 16)], device="cpu"),
    }
    for name, student in built.items():
        save_student(student, root / name)
    return {name: root / name for name in built}


@pytest.fixture
def student(students: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(students["bert"], tmp_path / "student"))


@pytest.fixture
def in_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that a fresh interpreter takes: what it runs is the same three calls."""

    def vectors(path: Path, texts: Sequence[str]) -> dict[str, np.ndarray]:
        model = SentenceTransformer(str(path), device="cpu", model_kwargs={"dtype": torch.float32})
        texts = list(texts)
        return {
            "query": model.encode_query(texts),
            "document": model.encode_document(texts),
            "plain": model.encode(texts),
            "alone": np.concatenate([model.encode([text]) for text in texts]),
        }

    monkeypatch.setattr(checkpoints, "_fresh_vectors", vectors)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def digests(path: Path) -> dict[str, str]:
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in path.rglob("*") if f.is_file()
    }


def with_sep(path: Path) -> None:
    """The original BERT template back in tokenizer.json."""
    special = {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (("[CLS]", 2), ("[SEP]", 3))}
    single = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    edit(
        path / "tokenizer.json",
        lambda c: c.update(
            post_processor={"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
        ),
    )


def editing(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda path: edit(path / file, change)


# Breaks that leave a checkpoint loadable, and its vectors wrong.
SILENT = {
    "tokenizer class": editing("tokenizer_config.json", lambda c: c.update(tokenizer_class="BertTokenizer")),
    "post-processor": with_sep,
    "include_prompt": editing("1_Pooling/config.json", lambda c: c.update(include_prompt=True)),
    "no default prompt": editing("config_sentence_transformers.json", lambda c: c.pop("default_prompt_name")),
    "null default prompt": editing("config_sentence_transformers.json", lambda c: c.update(default_prompt_name=None)),
    "query prompt": editing("config_sentence_transformers.json", lambda c: c["prompts"].update(query="")),
    "no prompts": editing(
        "config_sentence_transformers.json", lambda c: c.update(prompts={}, default_prompt_name=None)
    ),
    "unattended [MASK]s": editing("sentence_bert_config.json", lambda c: c["query_expansion"].update(attend=False)),
    "growing queries": editing("sentence_bert_config.json", lambda c: c["query_expansion"].update(strategy="min")),
    "other expansion token": editing(
        "sentence_bert_config.json", lambda c: c["query_expansion"].update(token="[SEP]")
    ),
    "tokenizer's limit": editing("tokenizer_config.json", lambda c: c.update(model_max_length=512)),
    "loader's limit": editing("sentence_bert_config.json", lambda c: c.update(max_seq_length=20)),
    "truncation side": editing("tokenizer_config.json", lambda c: c.update(truncation_side="left")),
}
# Breaks after which it can no longer be known what the student was.
UNKNOWABLE = {
    "no query expansion": (
        editing("sentence_bert_config.json", lambda c: c.pop("query_expansion")),
        r"sentence_bert_config\.json has no query length",
    ),
    "null query expansion": (
        editing("sentence_bert_config.json", lambda c: c.update(query_expansion=None)),
        r"sentence_bert_config\.json has no query length",
    ),
    "no expansion length": (
        editing("sentence_bert_config.json", lambda c: c["query_expansion"].pop("length")),
        r"sentence_bert_config\.json has no query length",
    ),
    "no document length": (
        editing("sentence_bert_config.json", lambda c: c.pop("document_length")),
        r"sentence_bert_config\.json has no document_length",
    ),
    "max pooling": (
        editing("1_Pooling/config.json", lambda c: c.update(pooling_mode="max")),
        r"1_Pooling/config\.json has the pooling_mode 'max'",
    ),
    "one more module": (
        editing("modules.json", lambda c: c.append({"type": "sentence_transformers.models.Normalize", "path": "2"})),
        r"modules\.json has the modules \['Transformer', 'Pooling', 'Normalize'\]",
    ),
}


# --- finalise_checkpoint ---


@pytest.mark.parametrize("name", ["bert", *KINDS])
def test_finalise_changes_no_byte_of_a_finalised_checkpoint(students: dict[str, Path], name: str) -> None:
    before = digests(students[name])
    finalise_checkpoint(students[name])
    finalise_checkpoint(str(students[name]))
    assert digests(students[name]) == before


def test_finalise_completes_a_stock_save_and_then_changes_nothing(students: dict[str, Path], tmp_path: Path) -> None:
    SentenceTransformer(str(students["bert"]), device="cpu").save_pretrained(str(tmp_path / "stock"))
    config = tmp_path / "stock" / "config_sentence_transformers.json"
    assert "requirements" not in json.loads(config.read_text())
    finalise_checkpoint(tmp_path / "stock")
    assert json.loads(config.read_text())["requirements"] == {"sentence-transformers": {"specifier": ">=6.0"}}
    before = digests(tmp_path / "stock")
    finalise_checkpoint(tmp_path / "stock")
    assert digests(tmp_path / "stock") == before


@pytest.mark.parametrize("broken", SILENT)
def test_finalise_mends(student: Path, broken: str, in_this_interpreter: None) -> None:
    SILENT[broken](student)
    finalise_checkpoint(student)
    validate_checkpoint(student)
    mended = digests(student)
    finalise_checkpoint(student)
    assert digests(student) == mended


def test_finalise_mends_everything_at_once(student: Path, students: dict[str, Path]) -> None:
    config = student / "config_sentence_transformers.json"
    for break_it in SILENT.values():
        break_it(student)
    edit(config, lambda c: c.update(requirements={"sentence-transformers": {"specifier": ">=2"}}))
    edit(config, lambda c: c.update(similarity_fn_name="cosine"))
    finalise_checkpoint(student)
    for file in sorted(students["bert"].rglob("*.json")):
        name = file.relative_to(students["bert"])
        assert json.loads((student / name).read_text()) == json.loads(file.read_text()), name
    assert "TokenizersBackend" in type(AutoTokenizer.from_pretrained(student)).__name__


@pytest.mark.parametrize("name", ["modernbert", "dense", "prompted"])
def test_finalise_leaves_an_own_encoding_student_as_it_is_but_names_the_version_that_a_query_length_needs(
    students: dict[str, Path], tmp_path: Path, name: str
) -> None:
    SentenceTransformer(str(students[name]), device="cpu").save_pretrained(str(tmp_path / "stock"))
    before = digests(tmp_path / "stock")
    finalise_checkpoint(tmp_path / "stock")
    after = digests(tmp_path / "stock")
    assert after.keys() == before.keys()
    changed = [file for file in before if after[file] != before[file]]
    assert changed == (["config_sentence_transformers.json"] if name == "prompted" else [])


def test_a_tct_student_that_lost_its_prompts_is_told_from_another_by_its_tokenizer(
    students: dict[str, Path], tmp_path: Path, in_this_interpreter: None
) -> None:
    path = Path(shutil.copytree(students["plain"], tmp_path / "student"))
    edit(path / "config_sentence_transformers.json", lambda c: c.update(prompts={}, default_prompt_name=None))
    finalise_checkpoint(path)
    assert digests(path) == digests(students["plain"])


def _not_a_scale(path: Path) -> None:
    weights = load_file(path / "3_Dense" / "model.safetensors")
    weights["linear.weight"][0, 1] = 1e-6
    save_file(weights, path / "3_Dense" / "model.safetensors", metadata={"format": "pt"})


def test_a_scale_that_is_no_single_number_is_refused(students: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(students["scaled"], tmp_path / "student"))
    _not_a_scale(path)
    for judge in (finalise_checkpoint, validate_checkpoint):
        with pytest.raises(ValueError, match=r"3_Dense/model\.safetensors holds something other than one number"):
            judge(path)
    (path / "3_Dense" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"3_Dense/model\.safetensors is missing"):
        finalise_checkpoint(path)


def test_an_activation_after_the_scale_is_refused(students: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(students["scaled"], tmp_path / "student"))
    edit(path / "3_Dense" / "config.json", lambda c: c.update(activation_function="torch.nn.modules.activation.Tanh"))
    with pytest.raises(ValueError, match=r"has the activation .*Tanh"):
        finalise_checkpoint(path)


def test_finalise_takes_a_start_token_written_as_an_object(student: Path) -> None:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    token = {"__type": "AddedToken", "content": "[CLS]", **flags}
    edit(student / "tokenizer_config.json", lambda c: c.update(cls_token=token))
    with_sep(student)
    finalise_checkpoint(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"]) == ["[CLS]", "the"]


def test_finalise_leaves_weights_and_unknown_files_alone(student: Path) -> None:
    (student / "report.json").write_text("{}")
    before = digests(student)
    for break_it in SILENT.values():
        break_it(student)
    finalise_checkpoint(student)
    after = digests(student)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in ("report.json", "model.safetensors", "config.json"))


@pytest.mark.parametrize("broken", UNKNOWABLE)
def test_finalise_refuses_and_names_the_file(student: Path, broken: str) -> None:
    break_it, message = UNKNOWABLE[broken]
    break_it(student)
    before = digests(student)
    with pytest.raises(ValueError, match=message):
        finalise_checkpoint(student)
    assert digests(student) == before


def test_finalise_refuses_a_vocabulary_without_the_start_token(student: Path) -> None:
    edit(student / "tokenizer_config.json", lambda c: c.update(cls_token="[START]"))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json names no cls_token"):
        finalise_checkpoint(student)


def test_finalise_refuses_an_encoder_and_colberts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"modules\.json is missing"):
        finalise_checkpoint(tiny_bert(tmp_path / "bert"))
    with pytest.raises(FileNotFoundError, match=r"modules\.json is missing"):
        finalise_checkpoint(stanford_colbert(tmp_path / "stanford"))
    ours = tiny_colbert(tmp_path / "ours")
    before = digests(ours)
    for colbert in (pylate_colbert(tmp_path / "pylate"), ours):
        with pytest.raises(ValueError, match=r"is a (ColBERT|MultiVectorEncoder), and no student"):
            finalise_checkpoint(colbert)
    assert digests(ours) == before


@pytest.mark.parametrize(
    "name",
    [
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "1_Pooling/config.json",
    ],
)
def test_finalise_names_a_file_that_is_missing_or_no_json(student: Path, name: str) -> None:
    (student / name).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        finalise_checkpoint(student)
    (student / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        finalise_checkpoint(student)


# --- validate_checkpoint ---


def test_a_good_checkpoint_passes_in_a_fresh_interpreter(students: dict[str, Path]) -> None:
    report = validate_checkpoint(students["bert"])
    assert 0 <= max(report.query, report.document, report.plain) <= 1e-5


@pytest.mark.usefixtures("warm_checks")
def test_a_checkpoint_that_needs_this_package_is_refused(student: Path) -> None:
    edit(student / "modules.json", lambda c: c[1].update(type="tct_hf.encoding.build.Pooling"))
    with pytest.raises(ValueError, match=r"(?s)does not load as a plain SentenceTransformer:.*tct_hf"):
        validate_checkpoint(student)


@pytest.mark.parametrize("name", KINDS)
def test_good_checkpoints_of_every_kind_pass(students: dict[str, Path], name: str, in_this_interpreter: None) -> None:
    report = validate_checkpoint(str(students[name]))
    assert 0 <= max(report.query, report.document, report.plain) <= 1e-5


@pytest.mark.parametrize("broken", SILENT)
def test_silently_wrong_vectors_are_an_error(student: Path, broken: str, in_this_interpreter: None) -> None:
    SILENT[broken](student)
    with pytest.raises(ValueError, match=r"(query|document|plain) vectors differ from the TCT encoding"):
        validate_checkpoint(student)


@pytest.mark.parametrize("broken", UNKNOWABLE)
def test_what_is_no_student_is_an_error(student: Path, broken: str) -> None:
    break_it, message = UNKNOWABLE[broken]
    break_it(student)
    with pytest.raises(ValueError, match=message):
        validate_checkpoint(student)


@pytest.mark.parametrize(("way", "row"), [("query", 0), ("document", 1), ("plain", 2), ("alone", 3)])
def test_an_own_encoding_student_that_gives_other_vectors_elsewhere_is_an_error(
    students: dict[str, Path], monkeypatch: pytest.MonkeyPatch, way: str, row: int
) -> None:
    fresh = checkpoints._fresh_vectors

    def other(path: Path, texts: Sequence[str]) -> dict[str, np.ndarray]:
        vectors = {name: np.array(found) for name, found in fresh(path, texts).items()}
        vectors[way][row] += 1e-3
        return vectors

    monkeypatch.setattr(checkpoints, "_fresh_vectors", other)
    with pytest.raises(ValueError, match=f"{way} vectors differ from the model's own encoding"):
        validate_checkpoint(students["prompted"])


def test_altered_weights_are_no_error(student: Path, in_this_interpreter: None) -> None:
    weights = {name: tensor * 1.5 for name, tensor in load_file(student / "model.safetensors").items()}
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    validate_checkpoint(student)


def test_vectors_that_are_not_finite_are_an_error(student: Path, in_this_interpreter: None) -> None:
    weights = {name: tensor * float("nan") for name, tensor in load_file(student / "model.safetensors").items()}
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="differ from the TCT encoding by nan"):
        validate_checkpoint(student)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        validate_checkpoint(tmp_path / "nowhere")
