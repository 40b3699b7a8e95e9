"""Students and ColBERTs against the TCT rule, written out here once more with plain transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from tct_hf import ColBERTTeacher, build_student, save_student, student_from_teacher
from tct_hf.encoding.build import build_colbert
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

DOCUMENT_LENGTH = 40
TITLE = "dense retrieval"
TEXTS = [
    "what is the teacher",
    "",
    "   ",
    *(" ".join(["the"] * words) for words in (31, 32, 33)),  # a query's 36 tokens hold 32 of the text
    *(" ".join(["query"] * words) for words in (35, 36, 37)),  # a passage's 40 tokens hold 36 of the text
    "retrieval of passage representations " * 100,
    "a literal [MASK] in the text",
    "[SEP] opens, [SEP] and [CLS] and [PAD] follow [SEP]",
    "<mask> </s> <s> <pad>",
    "[Q] is the prompt as a text [D]",
    "Café naïve résumé",
    "检索 passage 中文搜索",
    TITLE + " " + "the teacher and the student",
    "unknown ☃ characters",
]


class Rule:
    """The rule for one encoder: one text at a time, no padding, its own tokenizer with nothing added to the text."""

    def __init__(
        self, model: Any, base: Path, *, query_length: int = 36, document_length: int = DOCUMENT_LENGTH
    ) -> None:
        self.model = model.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.start, self.mask = self.tokenizer.cls_token, self.tokenizer.mask_token
        self.query_length, self.document_length = query_length, document_length

    def ids(self, text: str, length: int) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"][:length])

    def query_ids(self, text: str) -> list[int]:
        return self.ids(f"{self.start} [Q] {text}" + self.mask * self.query_length, self.query_length)

    def pooled(self, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            hidden = self.model(input_ids=torch.tensor([ids])).last_hidden_state[0].float().numpy()
        return hidden[4:].mean(0) if len(ids) > 4 else np.zeros(hidden.shape[1], dtype=np.float32)

    def queries(self, texts: list[str]) -> np.ndarray:
        return np.stack([self.pooled(self.query_ids(text)) for text in texts])

    def plain_queries(self, texts: list[str]) -> np.ndarray:
        """Without query augmentation: tokenised, attended and pooled like a passage."""
        return np.stack([self.pooled(self.ids(f"{self.start} [Q] {text}", self.query_length)) for text in texts])

    def documents(self, texts: list[str]) -> np.ndarray:
        return np.stack([self.pooled(self.ids(f"{self.start} [D] {text}", self.document_length)) for text in texts])


def load(path: Path, **kwargs: Any) -> SentenceTransformer:
    return SentenceTransformer(str(path), device="cpu", **kwargs)


def encoder(model: Any) -> Any:
    """The transformers model inside a SentenceTransformer or a ColBERT."""
    return model[0].model


def close(found: Any, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found, dtype=np.float32) - wanted).max() <= tolerance


class OwnRule(Rule):
    """The tokenizer's own input, prompt and special tokens pooled with the text."""

    def __init__(self, model: Any, base: Path, prompts: dict[str, str], pooling: str) -> None:
        super().__init__(model, base, query_length=DOCUMENT_LENGTH)
        self.prompts, self.pooling = prompts, pooling

    def vectors(self, texts: list[str], side: str, length: int) -> np.ndarray:
        made = []
        for text in texts:
            ids = self.tokenizer(self.prompts[side] + text, truncation=True, max_length=length)["input_ids"]
            with torch.no_grad():
                hidden = self.model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
            made.append(hidden[0] if self.pooling == "cls" else hidden.mean(0))
        return np.stack(made)

    def queries(self, texts: list[str]) -> np.ndarray:
        return self.vectors(texts, "query", self.query_length)

    def documents(self, texts: list[str]) -> np.ndarray:
        return self.vectors(texts, "document", self.document_length)


class ClsRule(Rule):
    """The start token's vector."""

    def pooled(self, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids])).last_hidden_state[0, 0].numpy()


class ScaledRule:
    """Another rule's vectors, all of one length but for zero."""

    def __init__(self, rule: Rule, length: float) -> None:
        self.rule, self.length = rule, length

    def scaled(self, vectors: np.ndarray) -> np.ndarray:
        return self.length * vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)

    def queries(self, texts: list[str]) -> np.ndarray:
        return self.scaled(self.rule.queries(texts))

    def documents(self, texts: list[str]) -> np.ndarray:
        return self.scaled(self.rule.documents(texts))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {"bert": tiny_bert(root / "bert"), "mpnet": tiny_mpnet(root / "mpnet")}


@pytest.fixture(scope="module")
def rules(bases: dict[str, Path]) -> dict[str, Rule]:
    return {name: Rule(AutoModel.from_pretrained(base), base) for name, base in bases.items()}


@pytest.fixture(scope="module")
def students(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved students: by save_student, after a second round, after the stock save of a loaded one."""
    root = tmp_path_factory.mktemp("students")
    paths = {}
    for name, base in bases.items():
        built = build_student(str(base), encoding="tct", document_length=DOCUMENT_LENGTH)
        paths[name] = save_student(built, root / name)
        paths[f"{name}, two rounds"] = save_student(load(paths[name]), root / f"{name}-2")
        load(paths[f"{name}, two rounds"]).save_pretrained(str(root / f"{name}-stock"))
        paths[f"{name}, stock save"] = root / f"{name}-stock"
    plain = build_student(
        str(bases["bert"]), encoding="tct", document_length=DOCUMENT_LENGTH, query_augmentation=False
    )
    paths["bert, no augmentation"] = save_student(plain, root / "plain")
    paths["bert, no augmentation, two rounds"] = save_student(load(root / "plain"), root / "plain-2")
    return paths


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_a_student_just_built_encodes_by_the_rule(bases: dict[str, Path], rules: dict[str, Rule], name: str) -> None:
    student = build_student(str(bases[name]), encoding="tct", document_length=DOCUMENT_LENGTH)
    close(student.encode_query(TEXTS), rules[name].queries(TEXTS))
    close(student.encode_document(TEXTS), rules[name].documents(TEXTS))


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("rounds", ["", ", two rounds", ", stock save"])
@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_a_loaded_student_encodes_by_the_rule(
    students: dict[str, Path], rules: dict[str, Rule], name: str, rounds: str, batch_size: int
) -> None:
    student = load(students[name + rounds])
    close(student.encode_query(TEXTS, batch_size=batch_size), rules[name].queries(TEXTS))
    close(student.encode_document(TEXTS, batch_size=batch_size), rules[name].documents(TEXTS))
    close(student.encode(TEXTS, batch_size=batch_size), rules[name].documents(TEXTS))


def test_a_single_text_is_encoded_as_in_a_list(students: dict[str, Path], rules: dict[str, Rule]) -> None:
    student = load(students["bert"])
    close(student.encode_query(TEXTS[0]), rules["bert"].queries(TEXTS[:1])[0])
    close(student.encode(TEXTS[0]), rules["bert"].documents(TEXTS[:1])[0])


def test_plain_encode_with_the_query_prompt_is_no_query(students: dict[str, Path], rules: dict[str, Rule]) -> None:
    """Why the documentation says encode_query: a prompt alone brings no [MASK]s."""
    found = load(students["bert"]).encode(TEXTS[:1], prompt_name="query")
    assert np.abs(found - rules["bert"].queries(TEXTS[:1])).max() > 1e-2


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("rounds", ["", ", two rounds"])
def test_without_query_augmentation_a_query_is_read_like_a_passage_of_36_tokens(
    students: dict[str, Path], rules: dict[str, Rule], rounds: str, batch_size: int
) -> None:
    student = load(students["bert, no augmentation" + rounds])
    close(student.encode_query(TEXTS, batch_size=batch_size), rules["bert"].plain_queries(TEXTS))
    close(student.encode_document(TEXTS, batch_size=batch_size), rules["bert"].documents(TEXTS))
    close(student.encode(TEXTS, batch_size=batch_size), rules["bert"].documents(TEXTS))
    features = student.preprocess(["the teacher"], prompt="[Q] ", task="query")
    tokens = student.tokenizer.convert_ids_to_tokens(features["input_ids"][0])
    assert tokens == ["[CLS]", "[", "q", "]", "the", "teacher"]


def test_a_query_is_36_attended_tokens(students: dict[str, Path], rules: dict[str, Rule]) -> None:
    student = load(students["bert"])
    features = student.preprocess(TEXTS, prompt="[Q] ", task="query")
    assert features["input_ids"].tolist() == [rules["bert"].query_ids(text) for text in TEXTS]
    assert features["attention_mask"].eq(1).all()
    assert features["prompt_length"] == 4


@pytest.mark.parametrize("augmented", [True, False])
def test_other_lengths_than_the_defaults_are_kept(bases: dict[str, Path], tmp_path: Path, augmented: bool) -> None:
    student = build_student(
        str(bases["bert"]), encoding="tct", query_length=9, document_length=7, query_augmentation=augmented
    )  # a query longer than a passage: the tokenizer's own limit must not cut it
    student = load(save_student(student, tmp_path / "student"))
    rule = Rule(AutoModel.from_pretrained(bases["bert"]), bases["bert"], query_length=9, document_length=7)
    close(student.encode_query(TEXTS), (rule.queries if augmented else rule.plain_queries)(TEXTS))
    close(student.encode_document(TEXTS), rule.documents(TEXTS))
    close(student.encode(TEXTS), rule.documents(TEXTS))


def test_defaults_are_36_and_154_tokens_mean_pooling_and_dot_product(bases: dict[str, Path]) -> None:
    student = build_student(str(bases["bert"]), encoding="tct")
    rule = Rule(AutoModel.from_pretrained(bases["bert"]), bases["bert"], document_length=154)
    long = ["the passage of a teacher " * 50]
    close(student.encode_document(long), rule.documents(long))
    assert student.max_seq_length == 154
    assert student.similarity_fn_name == "dot"
    assert student.prompts == {"query": "[Q] ", "document": "[D] "}


PROMPTS = {"query": "query: ", "document": "passage: "}


@pytest.fixture(scope="module")
def beyond(
    bases: dict[str, Path], rules: dict[str, Rule], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Any]]:
    """Saved students beyond the paper's, each with its rule."""
    root = tmp_path_factory.mktemp("beyond")
    bert, modern = bases["bert"], tiny_modernbert(root / "modernbert-base")
    distil, roberta = tiny_distilbert(root / "distilbert-base"), tiny_roberta(root / "roberta-base")
    models = {path: AutoModel.from_pretrained(path) for path in (bert, modern, distil, roberta)}
    none = {"query": "", "document": ""}
    own: dict[str, Any] = {"encoding": "own"}
    prompted = own | {"prompts": PROMPTS}
    normalised = embedding_model(root / "normalised", bert)
    made: dict[str, tuple[Path, dict[str, Any], Any]] = {
        "cls": (bert, {"pooling": "cls"}, ClsRule(models[bert], bert)),
        "scaled": (bert, {"scale": 9.0}, ScaledRule(rules["bert"], 3.0)),
        "cls, scaled": (bert, {"pooling": "cls", "scale": 9.0}, ScaledRule(ClsRule(models[bert], bert), 3.0)),
        "distilbert": (distil, {}, Rule(models[distil], distil)),
        "modernbert": (modern, own, OwnRule(models[modern], modern, none, "mean")),
        "modernbert, prompts, cls": (
            modern,
            prompted | {"pooling": "cls"},
            OwnRule(models[modern], modern, PROMPTS, "cls"),
        ),
        "roberta, prompts": (roberta, prompted, OwnRule(models[roberta], roberta, PROMPTS, "mean")),
        "bert, own": (bert, own, OwnRule(models[bert], bert, none, "mean")),
        "normalised, own": (normalised, own, ScaledRule(OwnRule(models[bert], bert, none, "mean"), 1.0)),
    }
    students = {}
    for name, (base, settings, rule) in made.items():
        built = build_student(str(base), **{"encoding": "tct", "document_length": DOCUMENT_LENGTH, **settings})
        close(built.encode_query(TEXTS), rule.queries(TEXTS))
        students[name] = save_student(built, root / name), rule
    return students


BEYOND = [
    "cls",
    "scaled",
    "cls, scaled",
    "distilbert",
    "modernbert",
    "modernbert, prompts, cls",
    "roberta, prompts",
    "bert, own",
    "normalised, own",
]


@pytest.mark.parametrize("name", BEYOND)
def test_a_student_beyond_the_papers_encodes_by_its_rule(
    beyond: dict[str, tuple[Path, Any]], tmp_path: Path, name: str
) -> None:
    path, rule = beyond[name]
    for place in (path, save_student(load(path), tmp_path / "again")):
        student = load(place)
        close(student.encode_query(TEXTS, batch_size=7), rule.queries(TEXTS))
        close(student.encode_document(TEXTS), rule.documents(TEXTS))
        close(student.encode(TEXTS, batch_size=1), rule.documents(TEXTS))
    assert student.similarity_fn_name == ("cosine" if name == "normalised, own" else "dot")


def test_the_first_dimensions_are_stocks_truncate_dim(beyond: dict[str, tuple[Path, Any]]) -> None:
    path, rule = beyond["scaled"]
    student = load(path, truncate_dim=8)
    close(student.encode_query(TEXTS), rule.queries(TEXTS)[:, :8])


def embedding_model(path: Path, base: Path, *, pooling: str = "mean", prompts: dict[str, str] | None = None) -> Path:
    """What stock sentence-transformers saves of an encoder, with normalised vectors."""
    transformer = Transformer(str(base))
    pool = Pooling(transformer.get_embedding_dimension(), pooling)
    SentenceTransformer(modules=[transformer, pool, Normalize()], prompts=prompts, device="cpu").save_pretrained(
        str(path)
    )
    return path


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


def test_own_lengths_are_the_tokenizers_and_a_query_length_is_kept_where_it_differs(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base, config = str(bases["bert"]), "config_sentence_transformers.json"
    rule = OwnRule(AutoModel.from_pretrained(base), bases["bert"], {"query": "", "document": ""}, "mean")
    alike = save_student(build_student(base, query_length=20, document_length=20), tmp_path / "alike")
    rule.query_length = rule.document_length = 20
    assert "requirements" not in json.loads((alike / config).read_text())
    for way in (load(alike).encode, load(alike).encode_query, load(alike).encode_document):
        close(way(TEXTS), rule.documents(TEXTS))
    other = save_student(build_student(base, query_length=9, document_length=20), tmp_path / "other")
    rule.query_length = 9
    assert json.loads((other / config).read_text())["requirements"] == {
        "sentence-transformers": {"specifier": ">=6.0"}
    }
    close(load(other).encode_query(TEXTS), rule.queries(TEXTS))
    close(load(other).encode(TEXTS), rule.documents(TEXTS))


def test_settings_of_the_other_encoding_are_refused(bases: dict[str, Path]) -> None:
    base = str(bases["bert"])
    with pytest.raises(ValueError, match="TCT encoding has its own"):
        build_student(base, encoding="tct", prompts=PROMPTS)
    for settings in ({"scale": 20.0}, {"query_augmentation": False}):
        with pytest.raises(ValueError, match='settings of encoding="tct"'):
            build_student(base, **settings)
    with pytest.raises(ValueError, match="dim=16"):
        build_colbert(base, dim=16)
    with pytest.raises(ValueError, match=r"query_length=4 leaves no token for the text: .* take 4"):
        build_student(base, prompts={"query": "query:"}, query_length=4)
    with pytest.raises(ValueError, match="document_length=193, but the encoder has 192 positions"):
        build_student(base, document_length=193)
    with pytest.raises(ValueError, match="encoding='e5' is not known"):
        build_student(base, encoding="e5")  # type: ignore[arg-type]


_FRESH = """
import json, sys
sys.modules["tct_hf"] = None
import numpy as np, torch
from sentence_transformers import SentenceTransformer
torch.set_num_threads(1)
try:
    import tct_hf
except ImportError:
    pass
else:
    raise SystemExit("tct_hf can be imported")
paths, texts, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
vectors = {}
for name, path in paths.items():
    model = SentenceTransformer(path, device="cpu")
    vectors[name + "/query"] = model.encode_query(texts)
    vectors[name + "/document"] = model.encode_document(texts)
    vectors[name + "/plain"] = model.encode(texts)
np.savez(out, **vectors)
"""


def test_students_encode_by_the_rule_in_an_interpreter_without_this_package(
    students: dict[str, Path], rules: dict[str, Rule], beyond: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    paths = {name: str(path) for name, path in students.items()} | {n: str(path) for n, (path, _) in beyond.items()}
    subprocess.run(
        [sys.executable, "-c", _FRESH, json.dumps(paths), json.dumps(TEXTS), str(tmp_path / "vectors.npz")],
        check=True,
        cwd=tmp_path,
        timeout=300,
    )
    with np.load(tmp_path / "vectors.npz") as found:
        for name in paths:
            rule = beyond[name][1] if name in beyond else rules[name.split(",")[0]]
            queries = rule.plain_queries if "no augmentation" in name else rule.queries
            close(found[f"{name}/query"], queries(TEXTS))
            close(found[f"{name}/document"], rule.documents(TEXTS))
            close(found[f"{name}/plain"], rule.documents(TEXTS))


def test_byte_level_bpe_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'Byte-level BPE .* or encoding="own"'):
        build_student(str(tiny_roberta(tmp_path / "roberta")), encoding="tct")


# --- a vector that may never change ---

GOLDEN_QUERY = [-0.511486, 0.267542, 0.917354, 0.796892, -0.777886, -0.693209, -0.746579, 0.719633]
GOLDEN_DOCUMENT = [-0.521433, 0.269991, 0.903807, 0.79797, -0.790183, -0.697178, -0.741867, 0.707292]


def golden_base(path: Path) -> Path:
    """A BERT of 8 dimensions whose every weight comes from numpy's frozen generator, not from an initialisation."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, "[", "]", "q", "d", "what", "is", "a", "dense", "passage", "ret", "##rie", "##val", "?"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, special, strict=True))).save_pretrained(path)
    model = BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
        )
    )
    random = np.random.RandomState(20101138)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.from_numpy(random.standard_normal(tuple(parameter.shape)) * 0.5))
    model.save_pretrained(path)
    return path


def test_golden_vector_never_changes(tmp_path: Path) -> None:
    student = build_student(str(golden_base(tmp_path / "base")), encoding="tct", document_length=16)
    student = load(save_student(student, tmp_path / "student"))
    close(student.encode_query("What is dense retrieval?"), np.array(GOLDEN_QUERY, dtype=np.float32), 1e-4)
    close(student.encode_document("A dense passage"), np.array(GOLDEN_DOCUMENT, dtype=np.float32), 1e-4)


# --- from a teacher ---


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {
        "ours": tiny_colbert(root / "ours", layers=3),
        "stanford": stanford_colbert(root / "stanford"),
        "pylate": pylate_colbert(root / "pylate"),
    }


TEACHERS = ["ours", "stanford", "pylate"]
MARKED = [*TEXTS, "[unused0] and [unused1] in a text", "[Q] [D] [Q]"]


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teachers_student_encodes_by_the_rule_with_the_teachers_encoder(
    teachers: dict[str, Path], bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    teacher = load_colbert(teachers[name])
    student = student_from_teacher(teacher, document_length=DOCUMENT_LENGTH)
    rule = Rule(
        encoder(teacher), bases["bert"]
    )  # all the tiny models have one vocabulary; this tokenizer is untouched
    ids = student.preprocess(MARKED, prompt="[Q] ", task="query")["input_ids"]
    assert ids.tolist() == [rule.query_ids(text) for text in MARKED]
    close(student.encode_query(MARKED), rule.queries(MARKED))
    close(student.encode_document(MARKED), rule.documents(MARKED))
    loaded = load(save_student(student, tmp_path / "student"))
    ids = loaded.preprocess(MARKED, prompt="[Q] ", task="query")["input_ids"]
    assert ids.tolist() == [rule.query_ids(text) for text in MARKED]
    close(loaded.encode_query(MARKED), rule.queries(MARKED))
    close(loaded.encode(MARKED), rule.documents(MARKED))


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_leaves_its_teacher_as_it_was(teachers: dict[str, Path], name: str) -> None:
    teacher = load_colbert(teachers[name])
    weights = {key: value.clone() for key, value in teacher.state_dict().items()}
    vectors = teacher.encode_query(["the [unused0] teacher"])
    tokenizer = teacher.tokenizer.backend_tokenizer.to_str()
    student = student_from_teacher(teacher, layers=[1], document_length=DOCUMENT_LENGTH)
    storages = {value.untyped_storage().data_ptr() for value in teacher.state_dict().values()}
    assert storages.isdisjoint(value.untyped_storage().data_ptr() for value in student.state_dict().values())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(0.5)
    student.tokenizer.add_tokens(["new"])
    assert teacher.tokenizer.backend_tokenizer.to_str() == tokenizer
    assert all(torch.equal(value, weights[key]) for key, value in teacher.state_dict().items())
    assert encoder(teacher).config.num_hidden_layers == len(encoder(teacher).encoder.layer) > 1
    assert np.array_equal(teacher.encode_query(["the [unused0] teacher"])[0], vectors[0])


def test_layers_named_are_the_teachers_layers_in_that_order(teachers: dict[str, Path], tmp_path: Path) -> None:
    teacher = load_colbert(teachers["ours"])
    student = student_from_teacher(teacher, layers=[2, 0], document_length=DOCUMENT_LENGTH)
    loaded = load(save_student(student, tmp_path / "student"))
    for model in (student, loaded):
        mine = encoder(model)
        assert mine.config.num_hidden_layers == len(mine.encoder.layer) == 2
        for kept, of in enumerate([2, 0]):
            theirs = encoder(teacher).encoder.layer[of].state_dict()
            assert all(torch.equal(value, theirs[key]) for key, value in mine.encoder.layer[kept].state_dict().items())
        embeddings = encoder(teacher).embeddings.state_dict()
        assert all(torch.equal(value, embeddings[key]) for key, value in mine.embeddings.state_dict().items())
    close(loaded.encode_query(TEXTS), student.encode_query(TEXTS))


@pytest.mark.parametrize("layers", [[], [3], [-1], [0, 0]])
def test_bad_layers_are_refused(teachers: dict[str, Path], bases: dict[str, Path], layers: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct layers of the encoder, 0 to 2"):
        student_from_teacher(load_colbert(teachers["ours"]), layers=layers)
    with pytest.raises(ValueError, match="distinct layers of the encoder, 0 to 1"):
        build_student(str(bases["bert"]), encoding="tct", layers=layers)


def test_build_student_keeps_the_layers_named(bases: dict[str, Path]) -> None:
    student = build_student(str(bases["mpnet"]), encoding="tct", layers=[1], document_length=DOCUMENT_LENGTH)
    base = AutoModel.from_pretrained(bases["mpnet"])
    [layer] = encoder(student).encoder.layer
    assert torch.equal(layer.output.dense.weight, base.encoder.layer[1].output.dense.weight)


def test_a_layer_that_holds_what_others_lack_is_not_moved(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    path = tmp_path / "t5"
    T5EncoderModel(T5Config(vocab_size=3000, d_model=32, d_kv=8, num_layers=3, num_heads=4, d_ff=64)).save_pretrained(
        path
    )
    AutoTokenizer.from_pretrained(tiny_roberta(tmp_path / "roberta")).save_pretrained(path)
    lengths: dict[str, Any] = {"query_length": 16, "document_length": 32, "encoding": "own"}
    with pytest.raises(
        ValueError, match=r"of layer 1 at its new place .*relative_attention_bias\.weight would be lost"
    ):
        build_student(str(path), layers=[1, 2], **lengths)
    modern = str(tiny_modernbert(tmp_path / "modernbert"))
    with pytest.raises(ValueError, match=r"of layer 1 at its new place attn_norm\.weight would be lost"):
        build_student(modern, layers=[1, 2], **lengths)
    student = build_student(str(path), layers=[0, 2], **lengths)
    save_student(student, tmp_path / "student")
    loaded = SentenceTransformer(str(tmp_path / "student"), device="cpu")
    np.testing.assert_array_equal(loaded.encode(["some words"]), student.encode(["some words"]))


@pytest.mark.parametrize("wrap", [str, Path, lambda path: ColBERTTeacher(str(path), dtype="float32")])
def test_a_teacher_is_a_path_or_a_colbert_teacher_too(teachers: dict[str, Path], wrap: Callable[[Path], Any]) -> None:
    wanted = student_from_teacher(load_colbert(teachers["stanford"]), document_length=DOCUMENT_LENGTH)
    student = student_from_teacher(wrap(teachers["stanford"]), document_length=DOCUMENT_LENGTH)
    close(student.encode_query(TEXTS), wanted.encode_query(TEXTS))
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_frozen_half_precision_teacher_gives_a_trainable_float32_student(teachers: dict[str, Path]) -> None:
    teacher = load_colbert(teachers["ours"]).to(torch.bfloat16).requires_grad_(False)
    student = student_from_teacher(teacher, document_length=DOCUMENT_LENGTH)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_student_from_teacher_without_query_augmentation(teachers: dict[str, Path], bases: dict[str, Path]) -> None:
    teacher = load_colbert(teachers["pylate"])
    student = student_from_teacher(teacher, query_augmentation=False, document_length=DOCUMENT_LENGTH)
    close(student.encode_query(MARKED), Rule(encoder(teacher), bases["bert"]).plain_queries(MARKED))


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_beyond_the_papers_starts_from_a_teacher_too(
    teachers: dict[str, Path], bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    teacher = load_colbert(teachers[name])
    cls = student_from_teacher(teacher, pooling="cls", scale=9.0, document_length=DOCUMENT_LENGTH)
    rule = ScaledRule(ClsRule(encoder(teacher), bases["bert"]), 3.0)
    close(load(save_student(cls, tmp_path / "cls")).encode_query(MARKED), rule.queries(MARKED))
    if name == "ours":
        with pytest.raises(ValueError, match=r"adds '\[CLS\]' and no more, which is the TCT encoding's input"):
            student_from_teacher(teacher, encoding="own", prompts=PROMPTS)
        return
    own = student_from_teacher(teacher, encoding="own", prompts=PROMPTS, document_length=DOCUMENT_LENGTH)
    wanted = OwnRule(encoder(teacher), bases["bert"], PROMPTS, "mean")  # never the teacher's own markers
    loaded = load(save_student(own, tmp_path / "own"))
    close(loaded.encode_query(MARKED), wanted.queries(MARKED))
    close(loaded.encode(MARKED), wanted.documents(MARKED))


def test_an_own_colbert_shares_tokens_with_its_student(tmp_path: Path) -> None:
    base = str(tiny_modernbert(tmp_path / "base"))
    lengths: dict[str, Any] = {"query_length": 16, "document_length": DOCUMENT_LENGTH}
    for prompts in (None, PROMPTS):
        build_colbert(base, prompts=prompts, **lengths).save_pretrained(str(tmp_path / "colbert"))
        teacher = ColBERTTeacher(str(tmp_path / "colbert"), dtype="float32")
        for student in (
            student_from_teacher(teacher, encoding="own"),  # prompts and lengths are the teacher's
            build_student(base, prompts=prompts, **lengths),
        ):
            teacher.attach(student)
            assert teacher.shares_tokens
        teacher.attach(student_from_teacher(teacher, encoding="own", prompts={"query": "other: "}))
        assert not teacher.shares_tokens


def test_what_is_no_colbert_and_an_unknown_encoding_are_refused(
    students: dict[str, Path], teachers: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match="SentenceTransformer is not a multi-vector model"):
        student_from_teacher(load(students["bert"]))
    with pytest.raises(ValueError, match="encoding='pylate' is not known"):
        student_from_teacher(str(teachers["ours"]), encoding="pylate")


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"document_length": 193}, "document_length=193, but the encoder has 192 positions"),
        ({"query_length": 193}, "query_length=193, but the encoder has 192 positions"),
        ({"query_length": 4}, "query_length=4 leaves no token"),
        ({"document_length": 4}, "document_length=4 leaves no token"),
        ({"pooling": "max"}, "pooling='max'"),
    ],
)
@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_bad_settings_are_refused(bases: dict[str, Path], name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_student(str(bases[name]), encoding="tct", **settings)


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_all_positions_of_an_encoder_can_be_used(bases: dict[str, Path], name: str) -> None:
    student = build_student(str(bases[name]), encoding="tct", document_length=192, query_length=192)
    rule = Rule(AutoModel.from_pretrained(bases[name]), bases[name], document_length=192, query_length=192)
    long = ["the teacher of dense retrieval " * 60]
    close(student.encode_document(long), rule.documents(long))
    close(student.encode_query(long), rule.queries(long))


def test_augmentation_without_a_mask_token_is_refused_and_works_without(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    AutoModel.from_pretrained(bases["bert"]).save_pretrained(tmp_path)
    backend = AutoTokenizer.from_pretrained(bases["bert"]).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", pad_token="[PAD]").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no mask token for query augmentation"):
        build_student(str(tmp_path), encoding="tct")
    assert build_student(str(tmp_path), encoding="tct", query_augmentation=False).encode_query("the").shape == (32,)


def test_a_special_token_without_an_embedding_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    AutoModel.from_pretrained(bases["bert"]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(bases["bert"])
    tokenizer.add_special_tokens({"mask_token": "[NEW_MASK]"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'\[NEW_MASK\]' .* has no embedding"):
        build_student(str(tmp_path), encoding="tct")


def test_weights_are_float32_unless_a_dtype_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    half = build_student(str(bases["bert"]), encoding="tct", dtype="bfloat16", document_length=DOCUMENT_LENGTH)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    save_student(half, tmp_path / "half")
    assert {p.dtype for p in build_student(str(tmp_path / "half"), encoding="tct").parameters()} == {torch.float32}
    loaded = load(tmp_path / "half", model_kwargs={"dtype": torch.float32})
    rule = Rule(AutoModel.from_pretrained(tmp_path / "half", dtype=torch.float32), bases["bert"])
    close(loaded.encode_query(TEXTS), rule.queries(TEXTS))
    close(load(tmp_path / "half").encode_query(TEXTS), rule.queries(TEXTS), tolerance=0.1)


def test_a_student_of_a_student_has_the_lengths_asked_for(students: dict[str, Path], rules: dict[str, Rule]) -> None:
    again = build_student(
        str(students["bert"]), encoding="tct", query_augmentation=False, document_length=DOCUMENT_LENGTH
    )
    close(again.encode_query(TEXTS), rules["bert"].plain_queries(TEXTS))
    close(again.encode(TEXTS), rules["bert"].documents(TEXTS))


# --- ColBERT and saves ---


def test_a_colbert_reads_the_tokens_of_its_students_and_gives_unit_vectors(bases: dict[str, Path]) -> None:
    torch.manual_seed(0)
    colbert = build_colbert(str(bases["bert"]), encoding="tct", dim=16, document_length=DOCUMENT_LENGTH)
    student = student_from_teacher(colbert, document_length=DOCUMENT_LENGTH)
    assert isinstance(colbert, MultiVectorEncoder)
    for side, prompt in (("query", "[Q] "), ("document", "[D] ")):
        mine = student.preprocess(TEXTS, prompt=prompt, task=side)
        theirs = colbert.preprocess(TEXTS, prompt=prompt, task=side)
        assert torch.equal(mine["input_ids"], theirs["input_ids"])
        assert torch.equal(mine["attention_mask"], theirs["attention_mask"])
    [vectors] = colbert.encode_query(["the teacher"])
    assert vectors.shape == (36, 16)
    assert np.linalg.norm(np.asarray(vectors), axis=1) == pytest.approx(np.ones(36), abs=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_own_colbert_scores_the_mean_of_the_best_cosines_before_any_training(
    bases: dict[str, Path], tmp_path: Path, pooling: str
) -> None:
    base = embedding_model(tmp_path / "base", bases["bert"], pooling=pooling, prompts=PROMPTS)
    build_colbert(str(base), document_length=DOCUMENT_LENGTH).save_pretrained(str(tmp_path / "colbert"))
    queries, passages = ["what is the teacher", "query"], TEXTS
    model, tokenizer = AutoModel.from_pretrained(bases["bert"]).eval(), AutoTokenizer.from_pretrained(bases["bert"])

    def tokens(text: str) -> torch.Tensor:
        ids = tokenizer(text, truncation=True, max_length=DOCUMENT_LENGTH)["input_ids"]
        with torch.no_grad():
            return torch.nn.functional.normalize(model(torch.tensor([ids])).last_hidden_state[0], dim=1)

    wanted = torch.tensor(
        [
            [
                (tokens("query: " + query) @ tokens("passage: " + passage).T).amax(1).mean().item()
                for passage in passages
            ]
            for query in queries
        ]
    )
    colbert = load_colbert(tmp_path / "colbert")
    found = colbert.similarity(colbert.encode_query(queries), colbert.encode_document(passages))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    teacher = ColBERTTeacher(str(tmp_path / "colbert"), dtype="float32")
    rows = [{} for _ in queries]
    inputs = teacher.collate(queries, [passages[:2], passages[9:11]], rows)
    torch.testing.assert_close(
        teacher.score_matrix(inputs, gather=False),
        wanted[:, [0, 1, 9, 10]],
        atol=1e-5,
        rtol=0,  # type: ignore[arg-type]
    )


def test_save_student_replaces_a_student_and_leaves_other_files(bases: dict[str, Path], tmp_path: Path) -> None:
    first = build_student(str(bases["bert"]), encoding="tct", document_length=DOCUMENT_LENGTH)
    path = save_student(first, tmp_path / "deep" / "student")
    assert path == tmp_path / "deep" / "student"
    (path / "checkpoint-1").mkdir()
    (path / "checkpoint-1" / "report.json").write_text("{}")
    second = build_student(str(bases["bert"]), encoding="tct", document_length=20, query_augmentation=False)
    save_student(second, str(path))
    assert (path / "checkpoint-1" / "report.json").read_text() == "{}"
    assert load(path).max_seq_length == 20
    assert [p.name for p in path.parent.iterdir()] == ["student"]


def test_save_student_refuses_what_is_no_student_and_writes_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a MultiVectorEncoder"):
        save_student(build_colbert(str(bases["bert"])), tmp_path / "student")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
