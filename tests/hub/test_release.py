from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, RepoCard
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

from tct_hf import build_student, release, save_student
from tct_hf.hub.cards import CardFacts
from tct_hf.hub_client import HubError
from tests.hub.models import dual_encoder, small_report
from tests.loopback_hub import READER, LoopbackHub
from tests.models import tiny_bert, tiny_colbert
from tests.recipe import ROOT, in_this_process

FACTS = CardFacts(
    license="apache-2.0",
    base_model="google-bert/bert-base-uncased",
    training_data="sentences made up for a test",
    teacher="tester/teacher",
    datasets=["BeIR/scifact"],
    language=["en"],
    limits=["It has learned nothing."],
)
TEXTS = ["a dense passage", "the teacher", ""]

pytestmark = pytest.mark.usefixtures("warm_checks")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    made = build_student(str(tiny_bert(path / "base")), encoding="tct", document_length=64)
    (path / "settings.yaml").write_text("seed: 13\n")
    return save_student(made, path / "student")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the interpreter of its own that looks at the vectors: for tests of what is pushed."""
    monkeypatch.setattr("tct_hf.encoding.checkpoint.validate_checkpoint", lambda path: None)


def test_a_student_comes_back_with_equal_weights_and_vectors(hub: LoopbackHub, student: Path) -> None:
    done = release(student, "tester/student", facts=FACTS, tag="v1.0")
    before = SentenceTransformer(str(student), device="cpu")
    after = SentenceTransformer("tester/student", revision="v1.0", device="cpu")
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor)
    for encode in ("encode_query", "encode_document", "encode"):
        assert (getattr(before, encode)(TEXTS) == getattr(after, encode)(TEXTS)).all()
    namespace: dict[str, Any] = {}
    exec(done.loading(), namespace)
    assert (namespace["model"].encode(TEXTS) == before.encode(TEXTS)).all()
    assert done.url == f"{hub.url}/tester/student" and 'revision="v1.0"' in done.loading()


def test_a_student_cut_to_its_first_dimensions_is_one_of_them_alone(student: Path, tmp_path: Path) -> None:
    small = SentenceTransformer(str(student), device="cpu", truncate_dim=8)
    done = release(
        save_student(small, tmp_path / "small"), "tester/small", facts=FACTS, dry_run=True, folder=tmp_path / "r"
    )
    assert "one 8-dimensional vector" in (tmp_path / "r" / "README.md").read_text(encoding="utf-8")
    assert done.family == "student" and SentenceTransformer(str(tmp_path / "r")).encode("x").shape == (8,)


def test_an_own_encoding_student_that_is_another_in_a_fresh_interpreter_is_not_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tct_hf.hub import release as releasing

    base = str(tiny_bert(tmp_path / "base"))
    made = build_student(base, query_length=16, document_length=24)
    save_student(made, tmp_path / "own")
    release(tmp_path / "own", "tester/own", facts=FACTS, dry_run=True)

    def other(command: list[str], **options: Any) -> Any:
        for number in range(2):
            np.save(Path(command[-1]) / f"{number}.npy", np.ones(32, np.float32))
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(releasing.subprocess, "run", other)
    with pytest.raises(ValueError, match="the query vector of 'a question' is another in a fresh interpreter"):
        release(tmp_path / "own", "tester/own", facts=FACTS, dry_run=True)


def test_a_teacher_comes_back_with_equal_token_vectors(hub: LoopbackHub, tmp_path: Path) -> None:
    from tct_hf import ColBERTTeacher
    from tct_hf.teachers.base import write_training_scale

    folder = tiny_colbert(tmp_path)
    write_training_scale(folder, 4.0)
    release(folder, "tester/teacher", facts=FACTS)
    before, after = MultiVectorEncoder(str(folder), device="cpu"), ColBERTTeacher("tester/teacher")
    for a, b in zip(before.encode_document(TEXTS), after.model.encode_document(TEXTS), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    assert after.training_scale == 4.0
    card = hub.files("tester/teacher")["README.md"].decode()
    assert "multiplied by 4.0 in its own training; a temperature of 0.25" in card


@pytest.mark.usefixtures("quick")
def test_what_is_pushed_is_the_model_its_card_and_its_recipe(hub: LoopbackHub, student: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(student, tmp_path / "run" / "student")
    (copy.parent / "settings.yaml").write_text("seed: 13\n")
    (copy / "training_args.bin").write_bytes(b"pickle")
    (copy / "notes.txt").write_text("private")
    done = release(copy, "tester/student", facts=FACTS, folder=tmp_path / "kept")
    files = hub.files("tester/student")
    assert done.left_out == ["notes.txt", "training_args.bin"]
    assert not any(name.endswith((".bin", ".pt", ".py", ".pkl")) for name in files)
    assert files["recipe.yaml"] == b"seed: 13\n"
    kept = {
        file.relative_to(tmp_path / "kept").as_posix() for file in (tmp_path / "kept").rglob("*") if file.is_file()
    }
    assert kept - {".tct_release.json"} == set(files) - {".gitattributes"} == set(done.sent)


@pytest.mark.usefixtures("quick")
def test_a_second_release_sends_what_has_changed(hub: LoopbackHub, student: Path) -> None:
    first = release(student, "tester/student", facts=FACTS)
    again = release(student, "tester/student", facts=FACTS)
    assert (again.sent, again.commit) == ([], first.commit) and again.unchanged == first.sent
    sent_before = dict(hub.uploaded)
    changed = release(student, "tester/student", facts=CardFacts(**{**vars(FACTS), "limits": ["Another."]}))
    assert changed.sent == ["README.md"]
    assert {name: hub.uploaded[name] - sent_before.get(name, 0) for name in hub.uploaded} == {
        name: int(name == "README.md") for name in hub.uploaded
    }


@pytest.mark.usefixtures("quick")
def test_weights_of_an_earlier_release_do_not_stay(hub: LoopbackHub, student: Path) -> None:
    from huggingface_hub import HfApi

    release(student, "tester/student", facts=FACTS)
    stale = "model-00001-of-00002.safetensors"
    HfApi().upload_file(path_or_fileobj=b"x" * 9, path_in_repo=stale, repo_id="tester/student")
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="picture.jpg", repo_id="tester/student")
    release(student, "tester/student", facts=CardFacts(**{**vars(FACTS), "limits": ["Another."]}))
    assert stale not in hub.files("tester/student") and "picture.jpg" in hub.files("tester/student")


@pytest.mark.usefixtures("quick")
def test_a_tag_does_not_move(hub: LoopbackHub, student: Path) -> None:
    release(student, "tester/student", facts=FACTS, tag="v1.0")
    release(student, "tester/student", facts=FACTS, tag="v1.0")  # nothing has changed: it names this commit
    requests = len(hub.repo("tester/student").commits)
    with pytest.raises(ValueError, match=r"has a tag v1\.0 already, of the commit \w{12}"):
        release(student, "tester/student", facts=CardFacts(**{**vars(FACTS), "limits": ["Another."]}), tag="v1.0")
    assert len(hub.repo("tester/student").commits) == requests


@pytest.mark.usefixtures("quick")
def test_a_branch_is_made_and_the_main_one_stays(hub: LoopbackHub, student: Path) -> None:
    release(student, "tester/student", facts=FACTS)
    release(student, "tester/student", facts=CardFacts(**{**vars(FACTS), "limits": ["Next."]}), revision="next")
    assert b"Next." in hub.files("tester/student", "next")["README.md"]
    assert b"Next." not in hub.files("tester/student")["README.md"]


@pytest.mark.usefixtures("quick")
def test_a_private_repository_is_refused_without_a_token_with_the_mend(
    hub: LoopbackHub, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tct_hf import load_student

    release(student, "tester/student", facts=FACTS, private=True)
    assert hub.repo("tester/student").private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"it is private and your token does not open it.*log in with `hf auth login`"):
        load_student("tester/student")
    assert load_student("tester/student", token=READER, device="cpu").encode(TEXTS).shape == (3, 32)


@pytest.mark.usefixtures("quick")
def test_dry_run_writes_all_and_asks_the_hub_nothing(hub: LoopbackHub, student: Path, tmp_path: Path) -> None:
    done = release(student, "tester/student", facts=FACTS, folder=tmp_path / "kept", dry_run=True)
    assert not hub.requests and done.url is None and "README.md" in done.sent
    loaded = SentenceTransformer(str(tmp_path / "kept"), device="cpu")
    assert (loaded.encode(TEXTS) == SentenceTransformer(str(student), device="cpu").encode(TEXTS)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "only the pickle pytorch_model.bin"),
        (
            lambda p: spoil(p, "modules.json", lambda m: m[1].update(type="my.Pooling")),
            "a SentenceTransformer|my.Pooling",
        ),
        (lambda p: spoil(p, "config.json", lambda c: c.update(auto_map={"AutoModel": "x.Y"})), "auto_map names code"),
        (lambda p: (p / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda p: spoil_weights(p), "does not load|vectors differ|not finite"),
    ],
)
def test_an_unfit_checkpoint_is_refused_before_anything_is_asked(
    hub: LoopbackHub, student: Path, tmp_path: Path, change: Any, message: str
) -> None:
    copy = shutil.copytree(student, tmp_path / "student")
    change(copy)
    with pytest.raises((ValueError, OSError), match=message):
        release(copy, "tester/student", facts=FACTS)
    assert not hub.requests


def spoil(path: Path, name: str, change: Any) -> None:
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))


def spoil_weights(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    weights["embeddings.LayerNorm.weight"] *= float("nan")
    save_file(weights, path / "model.safetensors", {"format": "pt"})


@pytest.mark.usefixtures("quick")
def test_a_card_that_is_not_complete_names_what_to_give(hub: LoopbackHub, student: Path) -> None:
    with pytest.raises(ValueError, match=r"give license \(such as .*base_model \(a Hub id.*training_data"):
        release(student, "tester/student")
    with pytest.raises(ValueError, match="'/tmp/encoder' is none"):
        release(student, "tester/student", facts=CardFacts(**{**vars(FACTS), "base_model": "/tmp/encoder"}))
    assert not hub.requests


def test_a_full_disk_says_how_much_room_it_takes(
    hub: LoopbackHub, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Any, target: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match=r"the disk is full.* takes \d+ MB"):
        release(student, "tester/student", facts=FACTS, folder=tmp_path / "kept")
    assert list(tmp_path.iterdir()) == [tmp_path / "hub-cache"] or list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_card_metadata_are_what_the_hub_reads(hub: LoopbackHub, student: Path) -> None:
    release(student, "tester/student", facts=FACTS)
    card = ModelCard(hub.files("tester/student")["README.md"].decode())
    card.validate()
    data = card.data
    assert (data.license, data.base_model, data.library_name) == (
        FACTS.license,
        FACTS.base_model,
        "sentence-transformers",
    )
    assert data.datasets == ["BeIR/scifact"] and data.pipeline_tag == "sentence-similarity"
    assert "tct-colbert" in data.tags and data.eval_results is None
    words = card.content
    for said in (
        "encode_query",
        "IndexFlatIP",
        "always 36 tokens",
        "up to 64 tokens",
        "It has learned nothing.",
        "@misc",
    ):
        assert said in words, said
    assert "alpha" not in words and "Effectiveness" not in words  # nobody measured any
    assert not re.search(r"None|\{\{|\{%", words)


@pytest.mark.usefixtures("quick")
def test_figures_go_along_and_only_those_of_this_model(hub: LoopbackHub, student: Path, tmp_path: Path) -> None:
    from tct_hf.retrieval.encode import describe_model

    weights = describe_model(SentenceTransformer(str(student), device="cpu"))["model"]["weights_sha256"]
    small_report(weights).save(tmp_path / "own")
    release(student, "tester/student", facts=FACTS, report=tmp_path / "own")
    files = hub.files("tester/student")
    assert {"report.json", "report.md", "latency.png", "storage.png"} <= set(files)
    assert ModelCard(files["README.md"].decode()).data.eval_results[0].metric_value == 0.6432
    small_report("0" * 64).save(tmp_path / "other")
    with pytest.raises(ValueError, match="it measured the student 'x', whose weights are not those"):
        release(student, "tester/student", facts=FACTS, report=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no such report"):
        release(student, "tester/student", facts=FACTS, report=tmp_path / "none")


@pytest.mark.usefixtures("quick")
def test_the_recipe_lists_what_would_go_then_pushes(
    hub: LoopbackHub,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "release.yaml").write_text(
        "license: mit\nbase_model: google-bert/bert-base-uncased\ntraining_data: words\nlanguage: [en]\n"
    )
    run = in_this_process(ROOT / "recipes" / "release.py", tmp_path / "release.yaml", monkeypatch)
    options = [f"--path={student}", "--repo_id=tester/a", "--tag=v1.0"]
    assert run(tmp_path / "out", *options, "--dry_run") == 0
    said = capsys.readouterr().out
    assert "| model.safetensors | to be pushed |" in said and "Nothing was pushed" in said
    assert run(tmp_path / "out", *options) == 0
    said = capsys.readouterr().out
    assert f"{hub.url}/tester/a" in said and 'SentenceTransformer("tester/a", revision="v1.0")' in said
    assert run(tmp_path / "out", "--repo_id=tester/a") == 2
    assert "path: must be given" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["student", "sparse_student", "teacher", "index"])
def test_templates_are_in_the_source_tree_and_in_a_wheel(name: str) -> None:
    from tct_hf.hub_client import template

    assert RepoCard(template(name).replace("{{ card_data }}", "license: mit")).data.license == "mit"
    tomllib = pytest.importorskip("tomllib")
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"]["force-include"][f"model_cards/{name}.md"] == f"tct_hf/hub/templates/{name}.md"
    assert (ROOT / "model_cards" / f"{name}.md").is_file() and "model_cards" in targets["sdist"]["only-include"]


@pytest.mark.parametrize(
    ("text", "suffix", "expected"),
    [
        ("source: /home/me/my data/set one\n", ".yaml", 'source: "set one"\n'),
        ('a: "/no/such/x"  # from /home/me/x\n', ".yaml", 'a: "x"  # from x\n'),
        ("a: [~/run/student, ../other/teacher, /data]\n", ".yaml", "a: [student, teacher, data]\n"),
        ("/home/me/x: 1\nb:\n  - '~me/y'\n", ".yaml", 'x: 1\nb:\n  - "y"\n'),
        ("u: https://a.b/c/d\nh: BeIR/scifact\nr: 1/2\nn: ~\ne: 1e-4\n", ".yaml", None),
        ('{"a": "C:\\\\Users\\\\me\\\\x", "b": ["file:///home/me/y z"]}', ".json", '{"a": "x", "b": ["y z"]}'),
        ("measured on /home/me/corpus/x, see [it](https://a.b/c)", ".md", "measured on x, see [it](https://a.b/c)"),
    ],
)
def test_what_is_released_names_no_folder_of_this_machine(text: str, suffix: str, expected: str | None) -> None:
    from tct_hf.hub.contents import without_local_paths

    found = without_local_paths(text, suffix)
    if suffix == ".json" and expected is not None:
        assert json.loads(found) == json.loads(expected)
    else:
        assert found == (text if expected is None else expected)
    assert without_local_paths(found, suffix) == found


@pytest.mark.usefixtures("quick")
def test_files_of_a_release_say_nothing_of_where_they_were_made(
    hub: LoopbackHub, student: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(student, tmp_path / "run" / "student")
    (copy.parent / "settings.yaml").write_text(f"data:\n  source: {tmp_path}/of me/corpus\n")
    (copy / "tct_origin.json").write_text(json.dumps({"source": f"{tmp_path}/gone", "made": "student"}))
    spoil(copy, "config.json", lambda config: config.update(_name_or_path=f"{tmp_path}/base"))
    release(copy, "tester/student", facts=FACTS)
    files = hub.files("tester/student")
    assert files["recipe.yaml"] == b"data:\n  source: corpus\n"
    assert json.loads(files["tct_origin.json"])["source"] == "gone"
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]


@pytest.mark.usefixtures("quick")
def test_a_folder_that_holds_something_else_is_left_alone(student: Path, tmp_path: Path) -> None:
    def keep(folder: Path, source: Path = student) -> Any:
        return release(source, "tester/a", facts=FACTS, folder=folder, dry_run=True)

    thesis = tmp_path / "mine" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt, which no earlier release put there"):
        keep(thesis.parent)
    copy = shutil.copytree(student, tmp_path / "run" / "student")
    for folder in (copy, copy.parent, copy / "release"):
        with pytest.raises(ValueError, match="lie in one another"):
            keep(folder, copy)
    for _ in range(2):  # an earlier release is replaced
        keep(tmp_path / "kept")
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt"):
        keep(tmp_path / "kept")
    assert thesis.read_text() == "years of work" and (copy / "model.safetensors").is_file()


@pytest.mark.usefixtures("quick")
def test_home_is_written_out(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = release(student, "tester/a", facts=FACTS, folder="~/kept", dry_run=True)
    assert done.folder == tmp_path / "kept" and not (tmp_path / "~").exists()


@pytest.mark.usefixtures("quick")
def test_nothing_of_an_earlier_release_or_a_training_stays(hub: LoopbackHub, student: Path) -> None:
    from huggingface_hub import HfApi

    first = release(student, "tester/student", facts=FACTS)
    left = [
        "tct_teacher.json",
        "report.json",
        "report.md",
        "last-checkpoint/optimizer.pt",
        "checkpoint-25/training_args.bin",
        "training_args.bin",
    ]
    for name in [*left, "mine/notes.txt"]:
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id="tester/student")
    again = release(student, "tester/student", facts=FACTS)
    assert again.sent == [] and again.commit != first.commit
    files = hub.files("tester/student")
    assert not set(left) & set(files) and "mine/notes.txt" in files
    assert release(student, "tester/student", facts=FACTS).commit == again.commit


@pytest.mark.usefixtures("quick")
def test_private_is_not_promised_of_a_public_repository(hub: LoopbackHub, student: Path) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo("tester/student", private=False)
    with pytest.raises(ValueError, match=r"is there already and public.*make it private in its settings"):
        release(student, "tester/student", facts=FACTS, private=True)
    assert set(hub.files("tester/student")) == {".gitattributes"}
    release(student, "tester/other", facts=FACTS, private=True)
    release(student, "tester/other", facts=FACTS, private=True)
    assert hub.repo("tester/other").private


def test_a_student_to_start_from_is_not_released(tmp_path: Path) -> None:
    from tct_hf import convert_checkpoint

    convert_checkpoint(dual_encoder(tmp_path / "dual"), tmp_path / "start")
    with pytest.raises(ValueError, match=r"tct_origin\.json: this is a student to start from.*train it"):
        release(tmp_path / "start", "me/it", facts=FACTS, dry_run=True)


def test_an_own_encoding_student_is_released_byte_for_byte(tmp_path: Path) -> None:
    source = save_student(build_student(str(dual_encoder(tmp_path / "dual")), document_length=64), tmp_path / "own")
    done = release(source, "tester/own", facts=FACTS, dry_run=True, folder=tmp_path / "r")
    assert done.family == "student"
    for name in done.sent:
        if name != "README.md":
            assert (tmp_path / "r" / name).read_bytes() == (source / name).read_bytes(), name
    card = (tmp_path / "r" / "README.md").read_text(encoding="utf-8")
    assert "Plain `encode` gives the same vectors" in card and "Passages are cut at 64 tokens." in card
    assert "needs sentence-transformers, and no other package" in card
