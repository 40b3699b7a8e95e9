from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

from tct_hf import (
    ColBERTTeacher,
    build_student,
    convert_checkpoint,
    load_student,
    save_student,
    student_from_teacher,
    validate_checkpoint,
)
from tct_hf.encoding.encoders import told_of_files
from tct_hf.encoding.kinds import recognise
from tct_hf.evaluation.workspace import open_student
from tct_hf.hub_client import HubError
from tct_hf.teachers.base import read_training_scale, write_training_scale
from tests.hub.models import TEXTS, dual_encoder, published_tct, pyserini_vectors
from tests.loopback_hub import LoopbackHub
from tests.models import pylate_colbert, stanford_colbert, tiny_bert, tiny_colbert
from tests.recipe import in_this_process

NAME = "castorini/tct_colbert-msmarco"
SETTINGS = "sentence_bert_config.json"


def tct_student(path: Path) -> Path:
    return save_student(build_student(str(tiny_bert(path / "base")), encoding="tct", document_length=64), path / "it")


def convert(source: str) -> None:
    convert_checkpoint(source, Path(source).with_name("out"))


def assert_pyserini(student: SentenceTransformer, source: Path) -> None:
    for side, encode in (("query", student.encode_query), ("document", student.encode_document)):
        expected = pyserini_vectors(source, TEXTS, side)
        assert np.abs(encode(TEXTS) - expected).max() <= 1e-5 * max(1.0, float(np.abs(expected).max())), side


def drop_weights(source: Path, named: str) -> None:
    weights = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if named not in name}
    save_file(kept, source / "model.safetensors", {"format": "pt"})


# --- load_student ---


def test_a_published_checkpoint_gives_its_own_vectors_in_one_line_and_is_kept(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = published_tct(tmp_path / "source", weights="bin")
    old = hub.publish(source, NAME)
    assert_pyserini(load_student(NAME, device="cpu"), source)
    plain = SentenceTransformer(NAME, device="cpu").encode(TEXTS[:1])
    assert np.abs(plain - pyserini_vectors(source, TEXTS[:1], "query")).max() > 0.05
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        offline.setattr("tct_hf.encoding.convert._write_student", lambda *args, **options: pytest.fail("again"))
        hub.requests.clear()
        load_student(NAME, device="cpu")
        assert not hub.requests
        with pytest.raises(HubError, match="not in the local cache"):
            load_student("castorini/tct_colbert-v2-msmarco")
    hub.publish(tiny_bert(tmp_path / "second", seed=9), NAME)
    assert_pyserini(load_student(NAME, revision=old, device="cpu"), source)
    with pytest.raises(HubError, match="no such revision"):
        load_student(NAME, revision="v9")


def test_a_clone_and_a_declared_encoder_are_converted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCT_HF_CACHE", str(tmp_path / "cache"))
    clone = published_tct(tmp_path / "tct_colbert-v2-msmarco")
    assert_pyserini(load_student(str(clone), device="cpu"), clone)
    own = published_tct(tmp_path / "own")
    with pytest.raises(ValueError, match='pass encoding="tct"'):
        load_student(str(own))
    assert_pyserini(load_student(str(own), encoding="tct", device="cpu"), own)
    cached = tmp_path / "models--castorini--tct_colbert-msmarco" / "snapshots" / ("0" * 40)
    other = tmp_path / "castorini--tct_colbert-msmarco" / "mine"
    assert [recognise(str(folder), tiny_bert(folder)).kind for folder in (cached, other)] == ["tct", "bare"]


@pytest.mark.parametrize(("extra", "times"), [({}, 0), ({"adapter.weight": torch.ones(2)}, 1)])
def test_weights_that_no_student_takes_are_reported_once_and_pretraining_heads_never(
    extra: dict[str, torch.Tensor], times: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = published_tct(tmp_path / "tct_colbert-v2-hnp-msmarco-r2")
    save_file({**load_file(source / "model.safetensors"), **extra}, source / "model.safetensors", {"format": "pt"})
    assert convert_checkpoint(source, tmp_path / "out").kind == "student"
    assert caplog.text.count("LOAD REPORT") == times


def test_a_student_is_loaded_as_it_is_and_put_right_where_it_was_saved_by_other_means(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    path = tct_student(tmp_path)
    wanted = SentenceTransformer(str(path), device="cpu").encode(TEXTS)
    hub.publish(path, "tester/student")
    assert (load_student("tester/student", device="cpu").encode(TEXTS) == wanted).all()
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "BertTokenizer"}))
    assert np.abs(SentenceTransformer(str(path), device="cpu").encode(TEXTS) - wanted).max() > 0.05
    weights = (path / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(ValueError, match=r"model\.safetensors, are missing"):
        load_student(str(path), device="cpu")
    weights.rename(path / "model.safetensors")  # what failed was not kept
    assert np.abs(load_student(str(path), device="cpu").encode(TEXTS) - wanted).max() < 1e-6


def with_length(file: Path, *keys: str) -> None:
    """Say a length of 10^9 under these names, one within the other."""
    content = found = json.loads(file.read_text())
    for key in keys[:-1]:
        found = found[key]
    found[keys[-1]] = 10**9
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("make", "file", "keys", "doors"),
    [
        (tct_student, SETTINGS, ("query_expansion", "length"), (load_student, open_student, validate_checkpoint)),
        (tiny_colbert, SETTINGS, ("query_expansion", "length"), (ColBERTTeacher,)),
        (pylate_colbert, "config_sentence_transformers.json", ("query_length",), (convert,)),
        (stanford_colbert, "artifact.metadata", ("query_maxlen",), (convert,)),
    ],
)
def test_a_checkpoint_that_would_pad_queries_until_memory_ends_is_refused(
    tmp_path: Path, make: Any, file: str, keys: tuple[str, ...], doors: tuple[Any, ...]
) -> None:
    folder = make(tmp_path / "made")
    with_length(folder / file, *keys)
    for opened in doors:
        with pytest.raises(ValueError, match="pads queries to 1,000,000,000 tokens, but its encoder takes 192"):
            opened(str(folder))


OWN, POOLING = "config_sentence_transformers.json", "1_Pooling/config.json"
DAMAGES: list[tuple[str, Any, list[Any]]] = [
    (SETTINGS, "document_length", [10**9, -1, "x", True]),
    (SETTINGS, "query_expansion", ["x", 5, {"length": "x"}]),
    ("config.json", "num_hidden_layers", [10**9, 10**6, 2000, -1, "x"]),
    ("config.json", "num_attention_heads", [-1]),
    ("config.json", "hidden_size", [-1, "x", None]),
    ("config.json", "architectures", [7, [7]]),
    (SETTINGS, "modality_config", ["x", {"text": 7}]),
    (SETTINGS, "module_output_name", ["x"]),
    (SETTINGS, "query_length", [-1, "x"]),
    (OWN, "prompts", ["x", [7]]),
    (OWN, "default_prompt_name", [7, "x"]),
    (POOLING, "pooling_mode", [7, "x", {}]),
    (POOLING, "embedding_dimension", [10**9, "x"]),
    ("tokenizer_config.json", "model_max_length", [-1, "x"]),
    ("tokenizer_config.json", "cls_token", [7]),
    ("modules.json", 0, ["x", {}]),
    ("modules.json", None, ["x", [], 7]),
]


def test_values_of_the_wrong_kind_are_told_with_the_file(tmp_path: Path) -> None:
    student = tct_student(tmp_path)
    doors: list[Any] = [lambda path: load_student(path, device="cpu"), build_student]
    for name, key, values in DAMAGES:
        before = (student / name).read_text()
        for value in values:
            content = value
            if key is not None:
                content = json.loads(before)
                content[key] = value
            (student / name).write_text(json.dumps(content))
            for opens in doors:
                told = f"^{student}.*{Path(name).name}.* can't be used|{name} is not JSON"
                with pytest.raises(ValueError, match=told):
                    opens(str(student))
        (student / name).write_text(before)


@pytest.mark.parametrize("value", [None, 10**9, 10**30])
def test_a_checkpoint_may_have_no_limit_of_tokens(tmp_path: Path, value: int | None) -> None:
    student = tct_student(tmp_path)
    for name, key in ((SETTINGS, "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        content = json.loads((student / name).read_text())
        (student / name).write_text(json.dumps({**content, key: value}))
    assert SentenceTransformer(str(student), device="cpu").encode("a").shape == (32,)
    build_student(str(student))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "^CUDA out of memory"),
        (RuntimeError("CUDA error: invalid device ordinal"), "^CUDA error"),
        (ValueError("Please pass `trust_remote_code=True`"), "needs code of its author"),
        (RuntimeError("size mismatch for weight"), "the weights can't be used"),
    ],
)
def test_what_no_file_causes_is_blamed_on_none(tmp_path: Path, error: Exception, message: str) -> None:
    for name in ("adapter_config.json", "modules.json"):  # each makes a model folder
        (tmp_path / name).write_text(
            '[{"type": "x.Transformer", "path": "0_Transformer"}]' if name[0] == "m" else "{}"
        )
        with pytest.raises((ValueError, RuntimeError), match=message) as caught, told_of_files(str(tmp_path)):
            raise error
        assert error in (caught.value, caught.value.__cause__)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_bert, "No file says how its texts are encoded"),
        (dual_encoder, "SentenceTransformer of .'Transformer', 'Pooling'. with mean pooling"),
        (stanford_colbert, "It is a teacher: ColBERTTeacher"),
        (pylate_colbert, "It is a teacher: ColBERTTeacher"),
        (lambda path: path, r"no config\.json here"),
        (lambda path: path / "none", "no such folder, and it is no Hub id"),
        (lambda path: "tester/none", "no such repository, or it is private"),
    ],
)
def test_what_is_no_tct_student_is_refused_with_the_way_to_load_it(
    hub: LoopbackHub, tmp_path: Path, make: Any, message: str
) -> None:
    with pytest.raises((ValueError, HubError, FileNotFoundError), match=message):
        load_student(str(make(tmp_path)))
    if "repository" in message:
        for door in (build_student, student_from_teacher, ColBERTTeacher, open_student):
            with pytest.raises(OSError, match=message):
                door("tester/none")


# --- convert_checkpoint ---


@pytest.mark.usefixtures("warm_checks")
def test_a_conversion_is_a_folder_that_stock_modules_load_and_replaces_only_an_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for weights in ("safetensors", "bin"):
        source = published_tct(tmp_path / weights, weights=weights)
        made = convert_checkpoint(source, out, kind="tct")
        assert made.kind == "student"
        student = SentenceTransformer(str(made.path), device="cpu")
        assert_pyserini(student, source)
        assert [file.name for file in out.rglob("*.safetensors")] == ["model.safetensors"]
        assert not list(out.rglob("*.bin")) and "seq_relationship" not in "".join(student.state_dict())
    validate_checkpoint(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="something other than a conversion"):
        convert_checkpoint(source, tmp_path / "mine", kind="tct")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "mine", "out", "safetensors"]


@pytest.mark.parametrize("make", [stanford_colbert, pylate_colbert, tiny_colbert])
def test_a_colbert_becomes_a_teacher_of_the_same_token_vectors(tmp_path: Path, make: Any) -> None:
    source = make(tmp_path / "source")
    write_training_scale(source, 4.0)
    # Of pickles only weights are read, and only where there are no safe ones.
    for name in ("training_args.bin", "pytorch_model.bin", "checkpoint-5/pytorch_model.bin"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"no weights")
    made = convert_checkpoint(source, tmp_path / "out")
    assert made.kind == "teacher" and read_training_scale(str(tmp_path / "out")) == 4.0
    before, after = MultiVectorEncoder(str(source), device="cpu"), ColBERTTeacher(str(made.path)).model
    for name in ("encode_query", "encode_document"):
        for a, b in zip(getattr(before, name)(TEXTS[:3]), getattr(after, name)(TEXTS[:3]), strict=True):
            assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-6


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_dual_encoder_becomes_a_student_to_start_from(tmp_path: Path, pooling: str) -> None:
    source = dual_encoder(tmp_path, pooling)
    made = convert_checkpoint(source, tmp_path / "out")
    assert made.kind == "starting student"
    student = SentenceTransformer(str(made.path), device="cpu")
    assert student[1].pooling_mode == pooling and student.prompts == {"query": "[Q] ", "document": "[D] "}
    for name, tensor in SentenceTransformer(str(source), device="cpu").state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor)


def test_nothing_is_guessed_in_a_conversion(tmp_path: Path) -> None:
    bare, out = tiny_bert(tmp_path / "bare"), tmp_path / "out"
    for source, kind, message in (
        (bare, "auto", 'pass kind="tct" if it was trained with the TCT encoding'),
        (bare, "dual-encoder", "whichever it was trained with"),
        (bare, "colbert", "a bare encoder without a projection"),
        (dual_encoder(tmp_path / "dual"), "tct", 'not "tct"; leave kind at "auto"'),
        (dual_encoder(tmp_path / "max", "max"), "auto", "pooling 'max' is unknown"),
        (tct_student(tmp_path), "auto", "there is nothing to convert"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(source, out, kind=kind)  # type: ignore[arg-type]
    assert not out.exists()


class _Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["TCT_HF_TEST_ATTACK"],)


def test_a_pickle_that_holds_code_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = published_tct(tmp_path / "source", weights="bin")
    monkeypatch.setenv("TCT_HF_TEST_ATTACK", str(tmp_path / "pwned"))
    torch.save({"x": _Attack()}, source / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(ValueError, match="its weights hold more than tensors"):
        convert_checkpoint(source, tmp_path / "out", kind="tct")
    assert not (tmp_path / "pwned").exists()


def test_weights_that_would_leave_a_model_partly_random_are_refused(tmp_path: Path) -> None:
    source = published_tct(tmp_path / "source")
    drop_weights(source, "layer.1.")
    with pytest.raises(ValueError, match="the model would be partly random"):
        convert_checkpoint(source, tmp_path / "out", kind="tct")
    (source / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        convert_checkpoint(source, tmp_path / "out", kind="tct")
    stanford = stanford_colbert(tmp_path / "stanford")
    drop_weights(stanford, "linear.weight")
    with pytest.raises(ValueError, match=r"the weights can't be used .*linear\.weight"):
        convert_checkpoint(stanford, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.network
def test_the_real_checkpoint_gives_pyserinis_vectors(tmp_path: Path) -> None:
    """In a process of its own: in this one the client talks to the loopback Hub."""
    code = """
import sys, torch
from transformers import AutoTokenizer, AutoModel
from tct_hf import load_student
name = "castorini/tct_colbert-msmarco"
student = load_student(name, device="cpu")
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
for side, text in (("query", "what is a passage"), ("document", "a passage of some words")):
    whole = f"[CLS] [Q] {text}{'[MASK]' * 36}" if side == "query" else f"[CLS] [D] {text}"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"][: 36 if side == "query" else 512]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).last_hidden_state[0, 4:].mean(0)
    vector = torch.as_tensor(getattr(student, f"encode_{side}")(text))
    assert (vector - expected).abs().max() < 1e-5, side
"""
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_ENDPOINT", "HF_HUB_OFFLINE")}
    online = "import httpx2; httpx2.head('https://huggingface.co', timeout=10)"
    if subprocess.run([sys.executable, "-c", online], env=kept, capture_output=True).returncode:
        pytest.skip("the Hub can't be reached")
    subprocess.run([sys.executable, "-c", code], env={**kept, "TCT_HF_CACHE": str(tmp_path)}, check=True)


@pytest.mark.usefixtures("warm_checks")
def test_the_recipe_converts_and_says_how_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = published_tct(tmp_path / "source")
    (tmp_path / "convert.yaml").write_text(f"source: {source}\n")
    run = in_this_process("convert", tmp_path / "convert.yaml", monkeypatch)
    assert 'pass kind="tct"' in run(tmp_path / "out", code=1).stderr
    said = run(tmp_path / "out", "--kind=tct").stdout
    assert "| student |" in said and f'SentenceTransformer("{tmp_path / "out"}")' in said
