from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, RepoCard
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

from tct_hf import ColBERTTeacher, build_student, convert_checkpoint, load_student, release, save_student
from tct_hf.data.collection import Collection, Split
from tct_hf.encoding import checkpoint
from tct_hf.encoding.weights import weights_digest
from tct_hf.hub.graphs import graph_section, int8_on_dev
from tct_hf.hub.release import cut_local_paths, without_local_paths
from tct_hf.hub_client import HubError, template
from tct_hf.teachers.base import write_training_scale
from tests.hub.models import FACTS as PLAIN
from tests.hub.models import dual_encoder, small_report
from tests.loopback_hub import READER, Blob, LoopbackHub
from tests.models import tiny_colbert
from tests.recipe import ROOT, in_this_process

FACTS = replace(PLAIN, datasets=["BeIR/scifact"], limits=["It has learned nothing."])
CHANGED = replace(FACTS, limits=["Another."])
TEXTS = ["a dense passage", "the teacher", ""]
NAME = "tester/student"

pytestmark = pytest.mark.usefixtures("warm_checks")


@pytest.fixture
def copy(student: Path, tmp_path: Path) -> Path:
    """A copy to change, with a folder of its own around it."""
    return Path(shutil.copytree(student, tmp_path / "run" / "student"))


def spoil(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))


# --- what comes back ---


def test_a_student_comes_back_with_equal_weights_and_vectors(hub: LoopbackHub, student: Path) -> None:
    done = release(student, NAME, facts=FACTS, tag="v1.0")
    before = SentenceTransformer(str(student), device="cpu")
    namespace: dict[str, Any] = {}
    exec(done.loading(), namespace)
    after = namespace["model"].to("cpu")
    assert all(torch.equal(after.state_dict()[name], tensor) for name, tensor in before.state_dict().items())
    for encode in ("encode_query", "encode_document", "encode"):
        assert (getattr(before, encode)(TEXTS) == getattr(after, encode)(TEXTS)).all()
    assert done.url == f"{hub.url}/{NAME}" and 'revision="v1.0"' in done.loading()
    card = ModelCard(hub.files(NAME)["README.md"].decode())
    card.validate()
    wanted = {"license": "mit", "base_model": FACTS.base_model, "datasets": ["BeIR/scifact"]}
    wanted |= {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    assert wanted.items() <= card.data.to_dict().items()
    assert {"dense", "tct-colbert"} <= set(card.data.tags) and "It has learned nothing." in card.content


def test_a_teacher_comes_back_with_equal_token_vectors(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = tiny_colbert(tmp_path)
    write_training_scale(folder, 4.0)
    release(folder, "tester/teacher", facts=FACTS)
    before, after = MultiVectorEncoder(str(folder), device="cpu"), ColBERTTeacher("tester/teacher")
    for a, b in zip(before.encode_document(TEXTS), after.model.encode_document(TEXTS), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    assert after.training_scale == 4.0
    card = hub.files("tester/teacher")["README.md"].decode()
    assert "multiplied by 4.0 in its own training; a temperature of 0.25" in card and "- colbert" in card


@pytest.mark.usefixtures("quick")
def test_other_students_are_released_byte_for_byte(student: Path, tmp_path: Path) -> None:
    own = build_student(str(dual_encoder(tmp_path / "dual")), document_length=64)
    cut = SentenceTransformer(str(student), device="cpu", truncate_dim=8)
    for model, said in ((own, "needs sentence-transformers, and no other"), (cut, "one 8-dimensional")):
        source, kept = save_student(model, tmp_path / "source"), tmp_path / "kept"
        done = release(source, "tester/own", facts=FACTS, dry_run=True, folder=kept)
        for file in set(done.sent) - {"README.md"}:
            assert (kept / file).read_bytes() == (source / file).read_bytes(), file
        assert said in (kept / "README.md").read_text(encoding="utf-8")


# --- what is pushed ---


@pytest.mark.usefixtures("quick")
def test_what_is_pushed_is_the_model_its_card_and_its_recipe(hub: LoopbackHub, copy: Path, tmp_path: Path) -> None:
    (copy.parent / "settings.yaml").write_text(f"seed: 13\ndata:\n  source: {tmp_path}/of me/corpus\n")
    (copy / "tct_origin.json").write_text(json.dumps({"source": f"{tmp_path}/gone", "made": "student"}))
    spoil(copy, "config.json", lambda config: config.update(_name_or_path=f"{tmp_path}/base"))
    (copy / "training_args.bin").write_bytes(b"pickle")
    (copy / "notes.txt").write_text("private")
    done = release(copy, NAME, facts=FACTS, folder=tmp_path / "kept")
    files = hub.files(NAME)
    assert done.left_out == ["notes.txt", "training_args.bin"]
    assert not any(name.endswith((".bin", ".pt", ".py", ".pkl")) for name in files)
    assert files["recipe.yaml"] == b"seed: 13\ndata:\n  source: corpus\n"
    assert json.loads(files["tct_origin.json"])["source"] == "gone"
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    kept = {f.relative_to(tmp_path / "kept").as_posix() for f in (tmp_path / "kept").rglob("*") if f.is_file()}
    assert kept - {".tct_release.json"} == set(files) - {".gitattributes"} == set(done.sent)


@pytest.mark.usefixtures("quick")
def test_a_second_release_sends_what_has_changed_and_removes_what_is_stale(hub: LoopbackHub, student: Path) -> None:
    first = release(student, NAME, facts=FACTS)
    again = release(student, NAME, facts=FACTS)
    assert (again.sent, again.commit, again.unchanged) == ([], first.commit, first.sent)
    sent_before = dict(hub.uploaded)
    assert release(student, NAME, facts=CHANGED).sent == ["README.md"]
    assert [name for name in hub.uploaded if hub.uploaded[name] != sent_before.get(name, 0)] == ["README.md"]
    stale = ("model-00001-of-00002.safetensors", "report.json", "last-checkpoint/optimizer.pt", "training_args.bin")
    repo, mine = hub.repo(NAME), ("picture.jpg", "mine/notes.txt")
    files = repo.commits[repo.branches["main"]].files
    repo.commit("main", "more", {**files, **{name: Blob(b"x", False) for name in (*stale, *mine)}})
    again = release(student, NAME, facts=CHANGED)
    names = set(hub.files(NAME))
    assert again.sent == [] and not set(stale) & names and set(mine) <= names
    assert release(student, NAME, facts=CHANGED).commit == again.commit
    # A tag does not move, and a branch leaves the main one as it is.
    release(student, NAME, facts=CHANGED, tag="v1.0")
    release(student, NAME, facts=CHANGED, tag="v1.0")  # nothing has changed: it names this commit
    commits = len(hub.repo(NAME).commits)
    with pytest.raises(ValueError, match=r"has a tag v1\.0 already, of the commit \w{12}"):
        release(student, NAME, facts=FACTS, tag="v1.0")
    assert len(hub.repo(NAME).commits) == commits
    release(student, NAME, facts=FACTS, revision="next")
    assert b"Another." in hub.files(NAME)["README.md"] and b"Another." not in hub.files(NAME, "next")["README.md"]


def test_graphs_go_along_and_are_compared_with_the_checkpoint(student: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    options: dict[str, Any] = {"facts": FACTS, "dry_run": True}
    done = release(student, NAME, openvino=True, folder=tmp_path / "release", **options)
    assert {"encoding.json", "openvino/openvino_model.xml", "openvino/openvino_model.bin"} <= set(done.sent)
    weights = tmp_path / "release" / "openvino" / "openvino_model.bin"
    content = weights.read_bytes()
    weights.write_bytes(bytes(20_000) + content[20_000:])
    with pytest.raises(ValueError, match=r"openvino_model\.xml differ by .*export it again"):
        release(tmp_path / "release", NAME, folder=tmp_path / "again", **options)


def test_a_card_says_what_int8_loses_on_dev_or_that_it_was_not_measured(student: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    options: dict[str, Any] = {"facts": FACTS, "dry_run": True, "onnx": True, "int8": True}
    release(student, NAME, folder=tmp_path / "release", **options)
    card = (tmp_path / "release" / "README.md").read_text()
    assert "`onnx/model_int8.onnx` | lowest cosine" in card and "was not measured" in card
    passages = [{"id": f"p{at}", "text": text} for at, text in enumerate(TEXTS)]
    split = Split({"q0": "query tokens", "q1": "the teacher"}, {"q0": {"p0": 1}, "q1": {"p1": 1}})
    collection = Collection("/some/where/small", Dataset.from_list(passages), {"dev": split}, {})
    folder = tmp_path / "release"
    found = int8_on_dev(folder, collection)
    model = SentenceTransformer(str(folder), device="cpu")
    scores = model.similarity(model.encode_query([*split.queries.values()]), model.encode_document(TEXTS))
    ranks = [int((row > row[at]).sum()) + 1 for at, row in enumerate(scores)]
    assert found[""] == pytest.approx(sum(1 / rank for rank in ranks) / 2)
    section = graph_section(folder, {"onnx/model.onnx": 1e-7, "onnx/model_int8.onnx": 0.99}, collection)
    assert f"| lowest cosine 0.9900 | {found['onnx/model_int8.onnx']:.3f} |" in str(section)
    assert "3 passages of small" in str(section)
    for given in ({}, {"collection": collection, "int8": False}, {"collection": collection, "card": "card.md"}):
        with pytest.raises(ValueError, match="int8_dev: it needs"):
            release(student, NAME, **{**options, "int8_dev": True, **given})
    collection.splits.clear()
    with pytest.raises(ValueError, match="small has no dev split"):
        int8_on_dev(folder, collection)


@pytest.mark.usefixtures("quick")
def test_a_private_repository_needs_a_token_and_is_not_promised_of_a_public_one(
    hub: LoopbackHub, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        release(student, NAME, facts=FACTS, private=True)
    assert hub.repo(NAME).private
    HfApi().create_repo("tester/public", private=False)
    with pytest.raises(ValueError, match=r"is there already and public.*make it private in its settings"):
        release(student, "tester/public", facts=FACTS, private=True)
    assert set(hub.files("tester/public")) == {".gitattributes"}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"it is private and your token does not open it.*log in with `hf auth login`"):
        load_student(NAME)
    assert load_student(NAME, token=READER, device="cpu").encode(TEXTS).shape == (3, 32)


@pytest.mark.usefixtures("quick")
def test_figures_go_along_and_only_those_of_this_model(hub: LoopbackHub, student: Path, tmp_path: Path) -> None:
    small_report(weights_digest(SentenceTransformer(str(student), device="cpu"))).save(tmp_path / "own")
    release(student, NAME, facts=FACTS, report=tmp_path / "own")
    files = hub.files(NAME)
    assert {"report.json", "report.md", "latency.png", "storage.png"} <= set(files)
    assert ModelCard(files["README.md"].decode()).data.eval_results[0].metric_value == 0.6432
    small_report("0" * 64).save(tmp_path / "other")
    for options, message in (
        ({"report": tmp_path / "other"}, "it measured the student 'x', whose weights are not those"),
        ({"report": tmp_path / "none"}, "no such report"),
        ({"recipe": "none.yaml"}, "no such recipe"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            release(student, NAME, facts=FACTS, **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick")
def test_the_recipe_lists_what_would_go_then_pushes(
    hub: LoopbackHub, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = "license: mit\nbase_model: google-bert/bert-base-uncased\ntraining_data: words\nlanguage: [en]\n"
    (tmp_path / "release.yaml").write_text(given)
    run = in_this_process("release", tmp_path / "release.yaml", monkeypatch)
    options = [f"--path={student}", "--repo_id=tester/a", "--tag=v1.0"]
    said = run(tmp_path / "out", *options, "--dry_run").stdout
    assert "| model.safetensors | to be pushed |" in said and "Nothing was pushed" in said and not hub.requests
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert (loaded.encode(TEXTS) == SentenceTransformer(str(student), device="cpu").encode(TEXTS)).all()
    said = run(tmp_path / "out", *options).stdout
    assert f"{hub.url}/tester/a" in said and 'SentenceTransformer("tester/a", revision="v1.0")' in said
    assert "path, repo_id: must be given" in run(tmp_path / "out", "--repo_id=tester/a", code=2).stderr


def test_templates_are_in_the_source_tree_and_in_a_wheel() -> None:
    tomllib = pytest.importorskip("tomllib")
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert "model_cards" in targets["sdist"]["only-include"]
    for name in ("student", "sparse_student", "teacher", "index"):
        assert RepoCard(template(name).replace("{{ card_data }}", "license: mit")).data.license == "mit"
        assert targets["wheel"]["force-include"][f"model_cards/{name}.md"] == f"tct_hf/hub/templates/{name}.md"
        assert (ROOT / "model_cards" / f"{name}.md").is_file()


def test_what_is_released_names_no_folder_of_this_machine() -> None:
    for text, suffix, expected in (
        ("source: /home/me/my data/set one\n", ".yaml", "source: set one\n"),
        ("a: BeIR/scifact  # from /home/me/x\n", ".yaml", "a: BeIR/scifact  # from x\n"),
        ("a: [~/run/student, ../other/teacher, /data]\n", ".yaml", "a:\n- student\n- teacher\n- data\n"),
        ("/home/me/x: 1\nb:\n  - '~me/y'\n", ".yaml", "x: 1\nb:\n- y\n"),
        ("u: https://a.b/c/d\nh: BeIR/scifact\nr: 1/2\nn: ~\ne: 1e-4\n", ".yaml", None),
        ('{"a": ["C:\\\\Users\\\\me\\\\x", "file:///me/y z"]}', ".json", '{\n  "a": [\n    "x",\n    "y z"\n  ]\n}\n'),
        ("measured on /home/me/corpus/x, see [it](https://a.b/c)", ".md", "measured on x, see [it](https://a.b/c)"),
    ):
        found = without_local_paths(text, suffix)
        assert found == (text if expected is None else expected) and without_local_paths(found, suffix) == found


@pytest.mark.parametrize("name", ["recipe.yaml", "tct_origin.json", "report.json", "report.md"])
@pytest.mark.parametrize("content", [b"a: [1", b"[" * 10**5, b"\xff"])
def test_a_damaged_small_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    if name != "report.md" or content == b"\xff":  # any text is Markdown
        with pytest.raises(ValueError, match=f"{name} can't be read"):
            cut_local_paths(tmp_path)


# --- what is refused ---


def spoil_weights(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights["embeddings.LayerNorm.weight"] *= float("nan")
    save_file(weights, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "only the pickle pytorch_model.bin"),
        (lambda p: spoil(p, "modules.json", lambda m: m[1].update(type="my.Pooling")), "my.Pooling is not one of"),
        (lambda p: spoil(p, "config.json", lambda c: c.update(auto_map={"AutoModel": "x.Y"})), "auto_map names code"),
        (lambda p: (p / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (spoil_weights, "weights that are not finite"),
    ],
)
def test_an_unfit_checkpoint_is_refused_before_anything_is_asked(
    hub: LoopbackHub, copy: Path, change: Any, message: str
) -> None:
    change(copy)
    with pytest.raises((ValueError, OSError), match=message):
        release(copy, NAME, facts=FACTS)
    assert not hub.requests


def test_a_student_to_start_from_or_that_is_another_elsewhere_is_not_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dual_encoder(tmp_path / "dual")
    convert_checkpoint(source, tmp_path / "start")
    with pytest.raises(ValueError, match=r"tct_origin\.json: this is a student to start from.*train it"):
        release(tmp_path / "start", "me/it", facts=FACTS, dry_run=True)
    other = checkpoint.own_vectors(source)
    other["document"][0] += 0.1
    monkeypatch.setattr(checkpoint, "fresh_vectors", lambda *args: other)
    with pytest.raises(ValueError, match=r"document vectors differ from those of .* here"):
        release(source, "tester/own", facts=FACTS, dry_run=True)


@pytest.mark.usefixtures("quick")
def test_a_folder_that_holds_something_else_is_left_alone(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(folder: Path | str) -> Any:
        return release(copy, "tester/a", facts=FACTS, folder=folder, dry_run=True)

    thesis = tmp_path / "mine" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt, which no earlier release put there"):
        keep(thesis.parent)
    for folder in (copy, copy.parent, copy / "release"):
        with pytest.raises(ValueError, match="lie in one another"):
            keep(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):  # an earlier release is replaced
        assert keep("~/kept").folder == tmp_path / "kept"
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt"):
        keep(tmp_path / "kept")
    assert thesis.read_text() == "years of work" and (copy / "model.safetensors").is_file()
