"""Students against the rules of their encodings; the settings and tokenizers that these need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from tct_hf import build_colbert, build_student, save_student, student_from_teacher
from tct_hf.encoding.encoders import tct_tokenizer
from tests.encoding.rules import (
    LENGTH,
    NONE,
    OWN,
    PROMPTS,
    QUERY_ALONE,
    TEXTS,
    Rule,
    close,
    embedding_model,
    load,
)


def check(student: SentenceTransformer, rule: Rule, tolerance: float = 1e-5) -> None:
    ways = {"query": student.encode_query, "document": student.encode_document, "plain": student.encode}
    for batch_size in (1, 7):
        for way, encode in ways.items():
            close(encode(TEXTS, batch_size=batch_size), rule.wanted[way], tolerance)


TCT: dict[str, Any] = {"encoding": "tct"}
# Base model, settings of build_student, options of the rule.
STUDENTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "paper": ("bert", {}, {}),
    "mpnet": ("mpnet", {}, {}),
    "distilbert": ("distilbert", {}, {}),
    "no augmentation": ("bert", {"query_augmentation": False}, {"augmented": False}),
    # A query longer than a passage: the tokenizer's own limit must not cut it.
    "short": ("bert", *[{"query_length": 9, "document_length": 7}] * 2),
    "all positions": ("mpnet", *[{"query_length": 192, "document_length": 192}] * 2),
    "cls, scaled": ("bert", {"pooling": "cls", "scale": 9.0}, {"pooling": "cls", "norm": 3.0}),
    "own": ("bert", OWN, {"prompts": NONE}),
    "own, short queries": ("bert", OWN | {"query_length": 9}, {"prompts": NONE, "query_length": 9}),
    "modernbert, prompts, cls": ("modernbert", OWN | {"prompts": PROMPTS, "pooling": "cls"}, {"pooling": "cls"}),
    "roberta, prompts": ("roberta", OWN | {"prompts": PROMPTS}, {}),
    "normalised": ("normalised", OWN, {"prompts": NONE, "norm": 1.0}),
    "prompts replaced": ("prompted", OWN | {"prompts": QUERY_ALONE}, {"prompts": NONE | QUERY_ALONE}),
}


@pytest.fixture(scope="module")
def made(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Rule]]:
    """Saved students, each with its rule."""
    root, found = tmp_path_factory.mktemp("students"), {}
    for name, (base, settings, options) in STUDENTS.items():
        student = build_student(str(bases[base]), **{"encoding": "tct", "document_length": LENGTH, **settings})
        encoding = {"prompts": PROMPTS} if "prompts" in settings else {}
        normalised = {"norm": 1.0} if base in ("normalised", "prompted") else {}
        if settings.get("encoding") == "own":
            encoding["query_length"] = LENGTH
        bare = bases["bert"] if base in ("normalised", "prompted") else bases[base]
        rule = Rule(AutoModel.from_pretrained(bare), bare, **{**encoding, **normalised, **options})
        close(student.encode_query(TEXTS), rule.wanted["query"])
        found[name] = save_student(student, root / name), rule
    return found


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_encodes_by_its_rule_after_every_way_to_save_it(
    made: dict[str, tuple[Path, Rule]], tmp_path: Path, name: str
) -> None:
    path, rule = made[name]
    check(load(path), rule)
    load(path).save_pretrained(str(tmp_path / "stock"))
    stock = load(tmp_path / "stock")
    check(load(save_student(stock, tmp_path / "again")), rule)
    close(stock.encode_query(TEXTS), rule.wanted["query"])
    close(stock.encode(TEXTS), rule.wanted["plain"])
    assert stock.similarity_fn_name == ("cosine" if name in ("normalised", "prompts replaced") else "dot")


def test_a_query_is_36_attended_tokens_and_the_prompt_alone_makes_no_query(
    made: dict[str, tuple[Path, Rule]], bases: dict[str, Path]
) -> None:
    path, rule = made["paper"]
    student = load(path)
    features = student.preprocess(TEXTS, prompt="[Q] ", task="query")
    assert features["input_ids"].tolist() == [rule.ids(text, "query") for text in TEXTS]
    assert features["attention_mask"].eq(1).all() and features["prompt_length"] == 4
    plain = student.encode(TEXTS[:1], prompt_name="query")  # why the documentation says encode_query
    assert np.abs(plain - rule.wanted["query"][:1]).max() > 1e-2
    close(student.encode_query(TEXTS[0]), rule.wanted["query"][0])
    close(load(path, truncate_dim=8).encode_query(TEXTS), rule.wanted["query"][:, :8])
    for name, needs in (("own", False), ("own, short queries", True), ("paper", True)):
        config = json.loads((made[name][0] / "config_sentence_transformers.json").read_text())
        assert ("requirements" in config) is needs
    default = build_student(str(bases["bert"]), encoding="tct")
    assert default.max_seq_length == 154 and default.prompts == {"query": "[Q] ", "document": "[D] "}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_embedding_model_is_a_student_as_it_is(bases: dict[str, Path], tmp_path: Path, pooling: str) -> None:
    prompts = {"query": "query: ", "document": "", "clustering": "cluster: "}
    stock = load(embedding_model(tmp_path / "stock", bases["bert"], pooling=pooling, prompts=prompts))
    built = build_student(str(tmp_path / "stock"))
    saved = load(save_student(built, tmp_path / "student"))
    stock.save_pretrained(str(tmp_path / "again"))
    for student in (built, saved):
        for way in ("encode", "encode_query", "encode_document"):
            np.testing.assert_array_equal(getattr(student, way)(TEXTS), getattr(stock, way)(TEXTS))
        assert student.prompts == prompts and student.similarity_fn_name == "cosine"
    for file in (tmp_path / "again").rglob("*.json"):  # an ordinary checkpoint: what the stock save would write
        ours = tmp_path / "student" / file.relative_to(tmp_path / "again")
        assert json.loads(ours.read_text()) == json.loads(file.read_text()), file.name


def test_prompts_given_replace_the_models_own(bases: dict[str, Path]) -> None:
    base, alone = str(bases["prompted"]), {**NONE, **QUERY_ALONE}
    for build in (build_student, build_colbert):
        assert build(base).prompts["clustering"] == "cluster: "
        for prompts, wanted, default in ((PROMPTS, PROMPTS, "document"), (QUERY_ALONE, alone, None)):
            model = build(base, prompts=prompts)
            assert model.prompts == wanted and model.default_prompt_name == default
    model = build_colbert(base)
    assert student_from_teacher(model, encoding="own").prompts == model.prompts


# --- settings ---


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        ("bert", TCT | {"document_length": 193}, "document_length=193, but the encoder has 192 positions"),
        ("mpnet", TCT | {"query_length": 193}, "query_length=193, but the encoder has 192 positions"),
        ("bert", TCT | {"query_length": 4}, r"query_length=4 leaves no token for the text: .* take 4"),
        ("bert", {"prompts": {"query": "query:"}, "query_length": 4}, "query_length=4 leaves no token"),
        ("bert", {"pooling": "max"}, "pooling='max'"),
        ("bert", {"encoding": "e5"}, "encoding='e5' is not known"),
        ("bert", TCT | {"prompts": PROMPTS}, "TCT encoding has its own"),
        ("bert", {"scale": 20.0}, 'settings of encoding="tct"'),
        ("bert", {"query_augmentation": False}, 'settings of encoding="tct"'),
        ("roberta", TCT, r'Byte-level BPE .* or encoding="own"'),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    bases: dict[str, Path], base: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_student(str(bases[base]), **settings)


def test_special_tokens_that_the_encoding_needs(bases: dict[str, Path], tmp_path: Path) -> None:
    AutoModel.from_pretrained(bases["bert"]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(bases["bert"])
    backend = tokenizer.backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", pad_token="[PAD]").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no mask token for query augmentation"):
        build_student(str(tmp_path), encoding="tct")
    assert build_student(str(tmp_path), encoding="tct", query_augmentation=False).encode_query("the").shape == (32,)
    tokenizer.add_special_tokens({"mask_token": "[NEW_MASK]"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'\[NEW_MASK\]' .* has no embedding"):
        build_student(str(tmp_path), encoding="tct")


def test_weights_of_a_half_precision_checkpoint_become_float32(bases: dict[str, Path], tmp_path: Path) -> None:
    half = build_student(str(bases["bert"]), encoding="tct", document_length=LENGTH).bfloat16()
    save_student(half, tmp_path / "half")
    assert {p.dtype for p in build_student(str(tmp_path / "half"), encoding="tct").parameters()} == {torch.float32}
    rule = Rule(AutoModel.from_pretrained(tmp_path / "half", dtype=torch.float32), bases["bert"])
    check(load(tmp_path / "half", model_kwargs={"dtype": torch.float32}), rule)
    close(load(tmp_path / "half").encode_query(TEXTS), rule.wanted["query"], tolerance=0.1)


def test_save_student_replaces_a_student_and_leaves_other_files(bases: dict[str, Path], tmp_path: Path) -> None:
    path = save_student(build_student(str(bases["bert"]), encoding="tct"), tmp_path / "deep" / "student")
    assert path == tmp_path / "deep" / "student"
    (path / "checkpoint-1").mkdir()
    (path / "checkpoint-1" / "report.json").write_text("{}")
    second = build_student(str(path), encoding="tct", document_length=20, query_augmentation=False)
    save_student(second, str(path))
    assert (path / "checkpoint-1" / "report.json").read_text() == "{}"
    assert load(path).max_seq_length == 20 and [p.name for p in path.parent.iterdir()] == ["student"]
    rule = Rule(AutoModel.from_pretrained(bases["bert"]), bases["bert"], augmented=False)
    close(load(path).encode_query(TEXTS), rule.wanted["query"])
    with pytest.raises(ValueError, match="A MultiVectorEncoder is no student of one vector a text"):
        save_student(build_colbert(str(bases["bert"])), tmp_path / "colbert")  # type: ignore[arg-type]
    assert not (tmp_path / "colbert").exists()


# --- tokenizers of the TCT encoding ---


def tokens(tokenizer: Any, text: str) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


def wordpiece(*vocabulary: str, **special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(["[UNK]", *vocabulary])}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


def test_what_can_not_make_tct_input_is_refused() -> None:
    lost = wordpiece("[CLS]", "[", "]", "q", "d", cls_token="[CLS]")
    lost._special_tokens_map["cls_token"] = "<s>"  # named, never added
    bos = tct_tokenizer(wordpiece("<s>", "[", "]", "q", "d", bos_token="<s>"), document_length=20)
    assert tokens(bos, "q") == ["<s>", "q"] and tokens(bos, "") == ["<s>"]
    for tokenizer, message in (
        (wordpiece("[", "]", "q", "d"), "neither a cls_token nor a bos_token"),
        (lost, "'<s>', the first token of every input, is not in the vocabulary"),
        (wordpiece("[CLS]", "q", "d", cls_token="[CLS]"), r"ends the prompt '\[Q\] ' with a special token"),
        (None, "tokenizers library"),
    ):
        with pytest.raises(ValueError, match=message):
            tct_tokenizer(tokenizer, document_length=20)
    added = wordpiece("[CLS]", "[", "]", "q", "d", cls_token="[CLS]")
    added.add_special_tokens({"extra_special_tokens": ["[Q]"]})
    assert tokens(tct_tokenizer(added, document_length=20, markers=["[Q] "]), "[Q] q") == ["[CLS]", "[", "q", "]", "q"]
