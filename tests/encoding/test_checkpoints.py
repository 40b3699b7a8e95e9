"""A student's files: put right by finalise_checkpoint, judged by validate_checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from transformers import AutoTokenizer

from tct_hf import build_student, finalise_checkpoint, save_student, validate_checkpoint
from tct_hf.encoding import checkpoint
from tests.models import pylate_colbert, stanford_colbert, tiny_bert, tiny_colbert, tiny_modernbert, tiny_mpnet

PROMPTS = {"query": "query: ", "document": "passage: "}
TCT: dict[str, Any] = {"encoding": "tct"}
KINDS: dict[str, dict[str, Any]] = {
    "bert": TCT,
    "mpnet": TCT,
    "plain": TCT | {"query_augmentation": False},
    "cls": TCT | {"pooling": "cls"},
    "bf16": TCT,
    "scaled": TCT | {"scale": 20.0},
    "modernbert": {},
    "prompted": {"query_length": 16, "prompts": PROMPTS, "pooling": "cls", "layers": [0, 1]},
    "dense": {},
}


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    make = {"mpnet": tiny_mpnet, "modernbert": tiny_modernbert, "bert": tiny_bert}
    bases = {name: str(function(root / f"{name}-base")) for name, function in make.items()}
    for name, settings in KINDS.items():
        student = build_student(bases.get(name, bases["bert"]), document_length=40, **settings)
        if name == "bf16":
            student.bfloat16()
        if name == "dense":
            student = SentenceTransformer(modules=[*student, Dense(32, 16)], device="cpu")
        save_student(student, root / name)
    return {name: root / name for name in KINDS}


@pytest.fixture
def student(students: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(students["bert"], tmp_path / "student"))


@pytest.fixture
def in_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that a fresh interpreter takes: it computes the same."""
    monkeypatch.setattr(checkpoint, "fresh_vectors", lambda path, texts, loader: checkpoint.own_vectors(path, loader))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def digests(path: Path) -> dict[str, str]:
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def with_sep(path: Path) -> None:
    """The original BERT template back in tokenizer.json."""
    special = {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (("[CLS]", 2), ("[SEP]", 3))}
    start, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in special)
    single = [start, {"Sequence": {"id": "A", "type_id": 0}}, end]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    edit(path / "tokenizer.json", lambda content: content.update(post_processor=template))


def editing(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda path: edit(path / file, change)


CONFIG, SETTINGS = "config_sentence_transformers.json", "sentence_bert_config.json"
POOLING, TOKENIZER = "1_Pooling/config.json", "tokenizer_config.json"
# Breaks that leave a checkpoint loadable, and its vectors wrong.
SILENT = {
    "tokenizer class": editing(TOKENIZER, lambda c: c.update(tokenizer_class="BertTokenizer")),
    "post-processor": with_sep,
    "include_prompt": editing(POOLING, lambda c: c.update(include_prompt=True)),
    "default prompt": editing(CONFIG, lambda c: c.pop("default_prompt_name")),
    "query prompt": editing(CONFIG, lambda c: c["prompts"].update(query="")),
    "no prompts": editing(CONFIG, lambda c: c.update(prompts={}, default_prompt_name=None)),
    "unattended [MASK]s": editing(SETTINGS, lambda c: c["query_expansion"].update(attend=False)),
    "growing queries": editing(SETTINGS, lambda c: c["query_expansion"].update(strategy="min")),
    "other expansion token": editing(SETTINGS, lambda c: c["query_expansion"].update(token="[SEP]")),
    "tokenizer's limit": editing(TOKENIZER, lambda c: c.update(model_max_length=512)),
    "loader's limit": editing(SETTINGS, lambda c: c.update(max_seq_length=20)),
    "truncation side": editing(TOKENIZER, lambda c: c.update(truncation_side="left")),
}
FLAGS = ("lstrip", "normalized", "rstrip", "single_word")
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2"}
# Breaks after which it can no longer be known what the student was.
UNKNOWABLE = {
    "no query expansion": (editing(SETTINGS, lambda c: c.pop("query_expansion")), f"{SETTINGS} has no query length"),
    "no document length": (editing(SETTINGS, lambda c: c.pop("document_length")), f"{SETTINGS} has no document_len"),
    "max pooling": (editing(POOLING, lambda c: c.update(pooling_mode="max")), f"{POOLING} has the pooling_mode 'max'"),
    "one more module": (editing("modules.json", lambda c: c.append(NORMALIZE)), r"has the modules \['Transformer', "),
    "start token": (editing(TOKENIZER, lambda c: c.update(cls_token="[START]")), "names no cls_token"),
}


# --- finalise_checkpoint ---


@pytest.mark.parametrize("name", KINDS)
def test_a_finalised_checkpoint_is_valid_and_changes_no_byte(
    students: dict[str, Path], name: str, in_this_interpreter: None
) -> None:
    before = digests(students[name])
    finalise_checkpoint(students[name])
    finalise_checkpoint(str(students[name]))
    assert digests(students[name]) == before
    report = validate_checkpoint(str(students[name]))
    assert 0 <= max(report.query, report.document, report.plain) <= 1e-5


@pytest.mark.parametrize(
    ("name", "changed"), [("bert", [CONFIG]), ("prompted", [CONFIG]), ("modernbert", []), ("dense", [])]
)
def test_finalise_completes_a_stock_save_and_leaves_an_own_encoding_student_as_it_is(
    students: dict[str, Path], tmp_path: Path, name: str, changed: list[str]
) -> None:
    SentenceTransformer(str(students[name]), device="cpu").save_pretrained(str(tmp_path))
    before = digests(tmp_path)
    finalise_checkpoint(tmp_path)
    after = digests(tmp_path)
    assert after.keys() == before.keys() and [file for file in before if after[file] != before[file]] == changed
    assert ("requirements" in json.loads((tmp_path / CONFIG).read_text())) is bool(changed)


@pytest.mark.parametrize("broken", SILENT)
def test_silently_wrong_vectors_are_an_error_until_finalise_puts_them_right(
    student: Path, broken: str, in_this_interpreter: None
) -> None:
    SILENT[broken](student)
    with pytest.raises(ValueError, match=r"(query|document|plain|alone) vectors differ from the TCT encoding"):
        validate_checkpoint(student)
    finalise_checkpoint(student)
    validate_checkpoint(student)


def test_finalise_puts_everything_right_at_once_and_leaves_other_files(
    student: Path, students: dict[str, Path]
) -> None:
    (student / "report.json").write_text("{}")
    before = digests(student)
    for break_it in SILENT.values():
        break_it(student)
    requirements = {"sentence-transformers": {"specifier": ">=2"}}
    edit(student / CONFIG, lambda c: c.update(requirements=requirements, similarity_fn_name="cosine"))
    finalise_checkpoint(student)
    for file in sorted(students["bert"].rglob("*.json")):
        name = file.relative_to(students["bert"])
        assert json.loads((student / name).read_text()) == json.loads(file.read_text()), name
    assert digests(student).keys() == before.keys()
    assert all(digests(student)[name] == before[name] for name in ("report.json", "model.safetensors", "config.json"))
    start = {"__type": "AddedToken", "content": "[CLS]"} | dict.fromkeys(FLAGS, False)
    edit(student / TOKENIZER, lambda c: c.update(cls_token=start))
    with_sep(student)
    finalise_checkpoint(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"]) == ["[CLS]", "the"]


def test_a_tct_student_that_lost_its_prompts_is_told_from_another_by_its_tokenizer(
    students: dict[str, Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(students["plain"], tmp_path / "student"))
    edit(path / CONFIG, lambda c: c.update(prompts={}, default_prompt_name=None))
    finalise_checkpoint(path)
    assert digests(path) == digests(students["plain"])


def not_a_scale(path: Path) -> None:
    weights = load_file(path / "3_Dense" / "model.safetensors")
    weights["linear.weight"][0, 1] = 1e-6
    save_file(weights, path / "3_Dense" / "model.safetensors", metadata={"format": "pt"})


def test_a_scale_that_is_no_single_number_is_refused(students: dict[str, Path], tmp_path: Path) -> None:
    tanh = "torch.nn.modules.activation.Tanh"
    for change in (not_a_scale, editing("3_Dense/config.json", lambda c: c.update(activation_function=tanh))):
        path = Path(shutil.copytree(students["scaled"], tmp_path / change.__name__))
        change(path)
        for judge in (finalise_checkpoint, validate_checkpoint):
            with pytest.raises(ValueError, match=r"3_Dense does more than multiply by one number"):
                judge(path)


@pytest.mark.parametrize("broken", UNKNOWABLE)
def test_what_can_not_be_known_is_refused_with_the_file(student: Path, broken: str) -> None:
    break_it, message = UNKNOWABLE[broken]
    break_it(student)
    before = digests(student)
    with pytest.raises(ValueError, match=message):
        finalise_checkpoint(student)
    assert digests(student) == before
    if broken != "start token":
        with pytest.raises(ValueError, match=message):
            validate_checkpoint(student)


def test_finalise_refuses_an_encoder_and_colberts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"modules\.json is missing"):
        finalise_checkpoint(stanford_colbert(tmp_path / "stanford"))
    ours = tiny_colbert(tmp_path / "ours")
    before = digests(ours)
    for colbert in (pylate_colbert(tmp_path / "pylate"), ours):
        with pytest.raises(ValueError, match=r"is a (ColBERT|MultiVectorEncoder), not a student"):
            finalise_checkpoint(colbert)
    assert digests(ours) == before


@pytest.mark.parametrize("name", ["modules.json", SETTINGS, "tokenizer.json", POOLING])
def test_finalise_names_a_file_that_is_missing_or_no_json(student: Path, name: str) -> None:
    (student / name).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        finalise_checkpoint(student)
    (student / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        finalise_checkpoint(student)


# --- validate_checkpoint ---


@pytest.mark.usefixtures("warm_checks")
def test_a_fresh_interpreter_passes_a_good_checkpoint_and_refuses_one_that_needs_this_package(
    students: dict[str, Path], student: Path
) -> None:
    for name in ("scaled", "prompted"):
        report = validate_checkpoint(students[name])
        assert 0 <= max(report.query, report.document, report.plain) <= 1e-5
    edit(student / "modules.json", lambda c: c[1].update(type="tct_hf.encoding.build.Pooling"))
    with pytest.raises(ValueError, match=r"(?s)does not load as a plain SentenceTransformer:.*tct_hf"):
        validate_checkpoint(student)


@pytest.mark.parametrize(("name", "way"), [("prompted", "query"), ("prompted", "alone"), ("bert", "document")])
def test_a_student_that_gives_other_vectors_elsewhere_is_an_error(
    students: dict[str, Path], monkeypatch: pytest.MonkeyPatch, way: str, name: str
) -> None:
    found = checkpoint.own_vectors(students[name])
    found[way][1] += 1e-3
    monkeypatch.setattr(checkpoint, "fresh_vectors", lambda *args: found)
    with pytest.raises(ValueError, match=rf"{way} vectors differ from the (TCT|model's own) encoding"):
        validate_checkpoint(students[name])
