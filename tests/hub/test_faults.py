"""What the Hub or the network does wrong, on purpose; each ends in one message with the mend, or in success."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tct_hf import build_student, load_student, release, save_student
from tct_hf.hub.cards import CardFacts
from tct_hf.hub_client import HubError
from tct_hf.pipeline.settings import TeacherSettings
from tct_hf.settings import SettingsError, load_settings
from tests.loopback_hub import READER, STRANGER, WRITER, LoopbackHub
from tests.models import tiny_bert

FACTS = CardFacts(license="mit", base_model="google-bert/bert-base-uncased", training_data="words")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    return save_student(
        build_student(str(tiny_bert(path / "base")), encoding="tct", document_length=64), path / "student"
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, student: Path) -> list[float]:
    """No waiting between the client's attempts, which are recorded; the vectors are other tests' business."""
    import huggingface_hub.utils._http

    waits: list[float] = []
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", waits.append)
    monkeypatch.setattr("tct_hf.encoding.checkpoint.validate_checkpoint", lambda path: None)
    return waits


def push(student: Path, **options: Any) -> Any:
    return release(student, "tester/student", facts=FACTS, **options)


@pytest.mark.parametrize(
    ("path", "status", "times", "message"),
    [
        ("/commit/", 401, 1, "answered 401.*token is missing or not valid|no such repository, or it is private"),
        ("/repos/create", 403, 1, "answered 403.*write access"),
        ("/commit/", 403, 1, "answered 403.*write access"),
        ("/preupload/", 404, 1, "answered 404|no such repository"),
        ("/branch/|/commit/", 409, 1, "answered 409.*exists already, or another change"),
        ("/commit/", 412, 1, "answered 412.*Somebody else has pushed meanwhile"),
        ("/preupload/", 429, 9, "answered 429.*wait some minutes"),
        ("/preupload/", 500, 9, "answered 500.*on the Hub's side"),
    ],
)
def test_a_refusal_is_one_message_with_the_mend(
    hub: LoopbackHub, student: Path, path: str, status: int, times: int, message: str
) -> None:
    hub.fail(path, status, times=times)
    with pytest.raises(HubError, match=message):
        push(student)
    hub.faults.clear()
    push(student)  # nothing is lost: the same call ends well
    assert "model.safetensors" in hub.files("tester/student")


@pytest.mark.parametrize(("token", "message"), [("hf_nobody", "401|no such"), (READER, "403"), (STRANGER, "403")])
def test_a_token_that_may_not(hub: LoopbackHub, student: Path, token: str, message: str) -> None:
    with pytest.raises(HubError, match=message):
        push(student, token=token)


def test_without_a_token(hub: LoopbackHub, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"there is no token .*log in with `hf auth login`"):
        push(student)
    assert not hub.repos


def test_a_stale_parent_loses_nobodys_work(hub: LoopbackHub, student: Path) -> None:
    from huggingface_hub import HfApi

    push(student)

    def somebody_pushes(method: str, path: str) -> None:
        if "/commit/" in path:
            hub.on_request = None
            HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo="theirs.txt", repo_id="tester/student")

    hub.on_request = somebody_pushes
    changed = CardFacts(**{**vars(FACTS), "limits": ["Another."]})
    with pytest.raises(HubError, match=r"412.*Somebody else has pushed meanwhile"):
        release(student, "tester/student", facts=changed)
    release(student, "tester/student", facts=changed)
    files = hub.files("tester/student")
    assert files["theirs.txt"] == b"theirs" and b"Another." in files["README.md"]


def test_429_waits_as_long_as_the_hub_asks_then_ends_well(hub: LoopbackHub, student: Path, quick: list[float]) -> None:
    hub.fail("/preupload/", 429, headers={"Retry-After": "7"})
    push(student)
    assert quick and quick[0] >= 7


def test_500_three_times_then_fine(hub: LoopbackHub, student: Path, quick: list[float]) -> None:
    hub.fail("/preupload/", 500, times=3)
    push(student)
    assert len(quick) == 3 and "model.safetensors" in hub.files("tester/student")


def test_a_connection_cut_in_mid_upload_is_taken_up_again(hub: LoopbackHub, student: Path, tmp_path: Path) -> None:
    hub.fail("^/lfs/", None, method="PUT", times=9)
    with pytest.raises(HubError, match=r"the connection broke|answered"):
        push(student)
    assert set(hub.files("tester/student")) == {".gitattributes"}  # no half release
    hub.faults.clear()
    hub.fail("/commit/", None, times=9)  # the weights arrive, the commit does not
    with pytest.raises(HubError):
        push(student)
    hub.faults.clear()
    push(student)
    weights = hashlib.sha256((student / "model.safetensors").read_bytes()).hexdigest()
    assert hub.uploaded[weights] == 1  # sent once, over all three attempts


def test_a_download_that_is_cut_is_taken_up_again(
    hub: LoopbackHub, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(student)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # what is kept of a cut download
    whole = (student / "model.safetensors").stat().st_size
    hub.fail("^/lfs/", None, method="GET", times=2)
    assert load_student("tester/student", device="cpu").encode(["words"]).shape == (1, 32)
    begun = [int(asked.removeprefix("bytes=").split("-")[0]) for asked in hub.ranges]
    assert len(begun) == 2 and whole // 3 < begun[0] <= whole // 2 < begun[1]


def test_a_gated_repository_says_where_its_terms_are_accepted(hub: LoopbackHub) -> None:
    hub.fail("tester/gated", 403, times=9, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(HubError, match=r"gated .*Accept the terms on its page, then log in"):
        load_student("tester/gated")


def test_offline_with_a_warm_cache(hub: LoopbackHub, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    push(student)
    online = load_student("tester/student", device="cpu").encode(["words"])
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert (load_student("tester/student", device="cpu").encode(["words"]) == online).all()
    assert not hub.requests
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set; unset it"):
        push(student)


def test_the_token_is_in_no_file_card_log_or_message(
    hub: LoopbackHub,
    student: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    said = []
    for fault in ("/repos/create", "/preupload/", "/commit/"):
        hub.fail(fault, 403)
        with pytest.raises(HubError) as caught:
            push(student, token=WRITER, folder=tmp_path / "kept")
        error: BaseException | None = caught.value
        while error is not None:
            said.append(f"{error!s} {error!r}")
            error = error.__cause__ or error.__context__
    done = push(student, token=WRITER, folder=tmp_path / "kept", tag="v1.0")
    load_student("tester/student", token=WRITER, device="cpu")
    out = capfd.readouterr()
    said += [caplog.text, out.out, out.err, repr(done), done.loading()]
    # The client's own debug log of a request's headers shows them redacted or not at all.
    assert not any(WRITER in text for text in said)
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert written and not any(WRITER.encode() in file.read_bytes() for file in written)
    assert hub.everything() and not any(WRITER.encode() in content for content in hub.everything().values())


@pytest.mark.parametrize("secret", [WRITER, "hf_" + "aB3" * 11])
@pytest.mark.parametrize("name", ["settings.yaml", "student/tct_origin.json", "student/tokenizer_config.json"])
def test_a_token_in_a_file_stops_the_release(
    hub: LoopbackHub, student: Path, tmp_path: Path, name: str, secret: str
) -> None:
    import shutil

    from tct_hf.encoding.kinds import read_json

    shutil.copytree(student, tmp_path / "student")
    file = tmp_path / name
    if file.suffix == ".yaml":
        file.write_text(f"student:\n  training:\n    hub_token: {secret}\n")
    else:
        file.write_text(json.dumps((read_json(file) or {}) | {"note": secret}))
    with pytest.raises(ValueError, match="a Hub token stands in it") as caught:
        push(tmp_path / "student", folder=tmp_path / "kept")
    named = "recipe.yaml" if name == "settings.yaml" else file.name
    assert str(caught.value).startswith(f"{named}:") and secret not in str(caught.value)
    assert not hub.requests and not (tmp_path / "kept").exists()


@dataclass
class Settings:
    teacher: TeacherSettings = field(default_factory=TeacherSettings)


def test_a_token_is_no_setting_of_a_recipe(tmp_path: Path) -> None:
    from tct_hf.training import run as training

    (tmp_path / "a.yaml").write_text(f"teacher:\n  training:\n    hub_token: {WRITER}\n")
    for arguments in ([str(tmp_path / "a.yaml")], [f"--teacher.training.hub_token={WRITER}"]):
        with pytest.raises(SettingsError, match="set HF_TOKEN or log in") as caught:
            load_settings(Settings, arguments, description="")
        assert WRITER not in str(caught.value)
    with pytest.raises(ValueError, match=r'training\.hub_token" is a secret'):
        training.train_colbert(
            lambda: pytest.fail("made"),
            lambda: pytest.fail("made"),
            tmp_path / "teacher",
            work=tmp_path / "work",
            arguments={"hub_token": WRITER},
            settings={},
        )
    assert not (tmp_path / "work").exists()
