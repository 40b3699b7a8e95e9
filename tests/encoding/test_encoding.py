"""Students and ColBERTs against the rules of their encodings, written out here once more with plain transformers."""

from __future__ import annotations

import copy
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from tct_hf import ColBERTTeacher, build_colbert, build_student, save_student, student_from_teacher
from tct_hf.encoding.encoders import tct_tokenizer
from tests.models import (
    load_colbert,
    pylate_colbert,
    stanford_colbert,
    tiny_bert,
    tiny_colbert,
    tiny_distilbert,
    tiny_modernbert,
    tiny_mpnet,
    tiny_roberta,
)

LENGTH = 40  # of a passage
TEXTS = [
    "what is the teacher",
    "",
    "   ",
    *(" ".join(["the"] * words) for words in (31, 32, 33)),  # a query's 36 tokens hold 32 of the text
    *(" ".join(["query"] * words) for words in (35, 36, 37)),  # a passage's 40 tokens hold 36 of the text
    "retrieval of passage representations " * 100,
    "[SEP] opens, [SEP] and [CLS] and [PAD] and a literal [MASK] follow [SEP]",
    "<mask> </s> <s> <pad>",
    "[Q] is the prompt as a text [D]",
    "Café naïve résumé 检索 passage 中文搜索 ☃",
]
PROMPTS = {"query": "query: ", "document": "passage: "}
QUERY_ALONE, NONE = {"query": "query: "}, {"query": "", "document": ""}


class Rule:
    """One text at a time, without padding, by the tokenizer of the base model.

    Args:
        prompts: of an own-encoding student; None: the TCT encoding.
        norm: length of every vector but zero; None: as pooled.
    """

    def __init__(
        self,
        model: Any,
        base: Path,
        *,
        query_length: int = 36,
        document_length: int = LENGTH,
        augmented: bool = True,
        pooling: str = "mean",
        norm: float | None = None,
        prompts: dict[str, str] | None = None,
    ) -> None:
        self.model, self.tokenizer = model.eval(), AutoTokenizer.from_pretrained(base)
        self.lengths = {"query": query_length, "document": document_length}
        self.augmented, self.pooling, self.norm, self.prompts = augmented, pooling, norm, prompts

    def ids(self, text: str, side: str) -> list[int]:
        length = self.lengths[side]
        if self.prompts is not None:
            return self.tokenizer(self.prompts[side] + text, truncation=True, max_length=length)["input_ids"]
        opening = f"{self.tokenizer.cls_token} {'[Q]' if side == 'query' else '[D]'} {text}"
        ending = self.tokenizer.mask_token * length if side == "query" and self.augmented else ""
        return self.tokenizer(opening + ending, add_special_tokens=False)["input_ids"][:length]

    def vectors(self, texts: list[str], side: str) -> np.ndarray:
        skipped, made = 4 if self.prompts is None else 0, []
        for text in texts:
            ids = self.ids(text, side)
            with torch.no_grad():
                hidden = self.model(input_ids=torch.tensor([ids])).last_hidden_state[0].float().numpy()
            if self.pooling == "cls":
                vector = hidden[0]
            else:
                vector = hidden[skipped:].mean(0) if len(ids) > skipped else np.zeros_like(hidden[0])
            made.append(vector if self.norm is None else self.norm * vector / max(np.linalg.norm(vector), 1e-12))
        return np.stack(made)

    @cached_property
    def wanted(self) -> dict[str, np.ndarray]:
        found = {side: self.vectors(TEXTS, side) for side in PROMPTS}
        return {**found, "plain": found["document"]}


def load(path: Path, **kwargs: Any) -> SentenceTransformer:
    return SentenceTransformer(str(path), device="cpu", **kwargs)


def close(found: Any, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found, dtype=np.float32) - wanted).max() <= tolerance


def check(student: SentenceTransformer, rule: Rule, tolerance: float = 1e-5) -> None:
    ways = {"query": student.encode_query, "document": student.encode_document, "plain": student.encode}
    for batch_size in (1, 7):
        for way, encode in ways.items():
            close(encode(TEXTS, batch_size=batch_size), rule.wanted[way], tolerance)


def embedding_model(path: Path, base: Path, *, pooling: str = "mean", prompts: dict[str, str] | None = None) -> Path:
    """What stock sentence-transformers saves of an encoder, with normalised vectors."""
    transformer = Transformer(str(base))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling), Normalize()]
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save_pretrained(str(path))
    return path


TCT: dict[str, Any] = {"encoding": "tct"}
OWN: dict[str, Any] = {"encoding": "own"}
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
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    make = {"mpnet": tiny_mpnet, "distilbert": tiny_distilbert, "modernbert": tiny_modernbert, "roberta": tiny_roberta}
    bert = tiny_bert(root / "bert")
    others = {"clustering": "cluster: ", "query": "old: ", "document": "old: "}
    return {
        **{name: function(root / name) for name, function in make.items()},
        "bert": bert,
        "normalised": embedding_model(root / "normalised", bert),
        "prompted": embedding_model(root / "prompted", bert, prompts=others),
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


# --- from a teacher ---


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {
        "ours": tiny_colbert(root / "ours", layers=3),
        "stanford": stanford_colbert(root / "stanford"),
        "pylate": pylate_colbert(root / "pylate"),
    }


MARKED = [*TEXTS, "[unused0] and [unused1] in a text", "[Q] [D] [Q]"]
CLS: dict[str, Any] = {"pooling": "cls", "scale": 9.0, "query_augmentation": False}
PROMPTED: dict[str, Any] = OWN | {"prompts": PROMPTS}
FROM_TEACHERS = [
    *((name, {}, {}) for name in ("ours", "stanford", "pylate")),
    *((name, CLS, {"pooling": "cls", "norm": 3.0, "augmented": False}) for name in ("ours", "stanford", "pylate")),
    *((name, PROMPTED, {"prompts": PROMPTS, "query_length": LENGTH}) for name in ("stanford", "pylate")),
]


@pytest.mark.parametrize(("name", "settings", "options"), FROM_TEACHERS)
def test_a_teachers_student_encodes_by_the_rule_with_the_teachers_encoder(
    teachers: dict[str, Path], bases: dict[str, Path], tmp_path: Path, name: str, settings: Any, options: Any
) -> None:
    teacher = load_colbert(teachers[name])
    # All the tiny models have one vocabulary; this tokenizer is untouched by the teacher's markers.
    rule = Rule(teacher[0].model, bases["bert"], **options)
    student = student_from_teacher(teacher, document_length=LENGTH, **settings)
    for model in (student, load(save_student(student, tmp_path / "student"))):
        close(model.encode_query(MARKED), rule.vectors(MARKED, "query"))
        close(model.encode(MARKED), rule.vectors(MARKED, "document"))


def test_a_student_leaves_its_teacher_as_it_was(teachers: dict[str, Path]) -> None:
    teacher = load_colbert(teachers["pylate"])
    before = copy.deepcopy(teacher)
    student = student_from_teacher(teacher, layers=[1], document_length=LENGTH)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(0.5)
    student.tokenizer.add_tokens(["new"])
    assert teacher.tokenizer.backend_tokenizer.to_str() == before.tokenizer.backend_tokenizer.to_str()
    assert teacher[0].model.config.num_hidden_layers == len(teacher[0].model.encoder.layer) > 1
    vectors, wanted = (model.encode_query(["the [unused0] teacher"])[0] for model in (teacher, before))
    assert np.array_equal(vectors, wanted)


def test_a_teacher_is_a_path_or_a_frozen_half_precision_colbert_too(teachers: dict[str, Path]) -> None:
    path = teachers["stanford"]
    wanted = student_from_teacher(load_colbert(path), document_length=LENGTH).encode_query(TEXTS)
    for teacher in (str(path), path, ColBERTTeacher(str(path), dtype="float32")):
        close(student_from_teacher(teacher, document_length=LENGTH).encode_query(TEXTS), wanted)
    student = student_from_teacher(load_colbert(path).to(torch.bfloat16).requires_grad_(False))
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in student.parameters())


def test_an_own_colbert_shares_tokens_with_its_student(bases: dict[str, Path], tmp_path: Path) -> None:
    base = str(bases["modernbert"])
    lengths: dict[str, Any] = {"query_length": 16, "document_length": LENGTH}
    build_colbert(base, prompts=PROMPTS, **lengths).save_pretrained(str(tmp_path / "colbert"))
    teacher = ColBERTTeacher(str(tmp_path / "colbert"), dtype="float32")
    for student, shared in (
        (student_from_teacher(teacher, encoding="own"), True),  # prompts and lengths are the teacher's
        (build_student(base, prompts=PROMPTS, **lengths), True),
        (student_from_teacher(teacher, encoding="own", prompts={"query": "other: "}), False),
    ):
        teacher.attach(student)
        assert teacher.shares_tokens is shared


# --- layers ---


def test_layers_named_are_kept_in_that_order(
    teachers: dict[str, Path], bases: dict[str, Path], tmp_path: Path
) -> None:
    teacher = load_colbert(teachers["ours"])
    student = student_from_teacher(teacher, layers=[2, 0], document_length=LENGTH)
    for model in (student, load(save_student(student, tmp_path / "student"))):
        layers = model[0].model.encoder.layer
        assert model[0].model.config.num_hidden_layers == len(layers) == 2
        for kept, of in enumerate([2, 0]):
            theirs = teacher[0].model.encoder.layer[of].state_dict()
            assert all(torch.equal(value, theirs[key]) for key, value in layers[kept].state_dict().items())
        close(model.encode_query(TEXTS), student.encode_query(TEXTS))
    for wrong in ([], [3], [-1], [0, 0]):
        with pytest.raises(ValueError, match="distinct layers of the encoder, 0 to 2"):
            student_from_teacher(teacher, layers=wrong)
    # The first layer lacks a norm that the others have.
    with pytest.raises(ValueError, match=r"at its new place layers\.0\.attn_norm\.weight would be lost"):
        build_student(str(bases["modernbert"]), layers=[1, 2], query_length=16, document_length=32)


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


# --- ColBERT and saves ---


def test_a_colbert_reads_the_tokens_of_its_students_and_gives_unit_vectors(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    colbert = build_colbert(str(bases["bert"]), encoding="tct", dim=16, document_length=LENGTH)
    student = student_from_teacher(colbert, document_length=LENGTH)
    for side, prompt in (("query", "[Q] "), ("document", "[D] ")):
        mine, theirs = (model.preprocess(TEXTS, prompt=prompt, task=side) for model in (student, colbert))
        for key in ("input_ids", "attention_mask"):
            assert torch.equal(mine[key], theirs[key])
    [vectors] = colbert.encode_query(["the teacher"])
    assert vectors.shape == (36, 16)
    assert np.linalg.norm(np.asarray(vectors), axis=1) == pytest.approx(np.ones(36), abs=1e-5)
    with pytest.raises(ValueError, match="SentenceTransformer is not a multi-vector model"):
        student_from_teacher(student)
    student.save_pretrained(str(tmp_path / "student"))
    with pytest.raises(ValueError, match=r"student is no ColBERT \(student\).* use build_student"):
        student_from_teacher(tmp_path / "student")
    with pytest.raises(ValueError, match=r"adds '\[CLS\]' and no more, which is the TCT encoding's input"):
        student_from_teacher(colbert, **PROMPTED)
    with pytest.raises(ValueError, match="dim=16"):
        build_colbert(str(bases["bert"]), dim=16)


def test_an_own_colbert_scores_the_mean_of_the_best_cosines_before_any_training(bases: dict[str, Path]) -> None:
    colbert = build_colbert(str(bases["prompted"]), document_length=LENGTH, prompts=PROMPTS)
    queries, passages = ["what is the teacher", "query"], TEXTS
    model, tokenizer = AutoModel.from_pretrained(bases["bert"]).eval(), AutoTokenizer.from_pretrained(bases["bert"])

    def tokens(text: str) -> torch.Tensor:
        ids = tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"]
        with torch.no_grad():
            return torch.nn.functional.normalize(model(torch.tensor([ids])).last_hidden_state[0], dim=1)

    wanted = torch.tensor(
        [[(tokens(f"query: {q}") @ tokens(f"passage: {p}").T).amax(1).mean() for p in passages] for q in queries]
    )
    found = colbert.similarity(colbert.encode_query(queries), colbert.encode_document(passages))
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=0)


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
