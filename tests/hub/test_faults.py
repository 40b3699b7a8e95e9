"""What the Hub or the network does wrong, on purpose; each ends in one message with the fix, or in success."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
from huggingface_hub import HfApi

from tct_hf import BM25Index, load_student, release
from tct_hf.hub_client import HubError
from tests.hub.models import FACTS
from tests.loopback_hub import READER, STRANGER, WRITER, LoopbackHub

NAME = "tester/student"
INDEX = BM25Index.build(["a passage", "another"], ["a", "b"])


@pytest.fixture(autouse=True)
def without_waits(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's waits between attempts take no time."""
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)


def push(student: Path, **options: Any) -> Any:
    return release(student, NAME, **{"facts": FACTS, **options})


@pytest.mark.parametrize(
    ("path", "status", "times", "message"),
    [
        ("/commit/", 401, 1, "answered 401.*token is missing or not valid|no such repository, or it is private"),
        ("/repos/create", 403, 1, "answered 403.*write access"),
        ("/preupload/", 404, 1, "answered 404|no such repository"),
        ("/branch/|/commit/", 409, 1, "answered 409.*exists already, or another change"),
        ("/preupload/", 429, 9, "answered 429.*wait some minutes"),
        ("/preupload/", 500, 9, "answered 500.*on the Hub's side"),
        ("/repos/create", 400, 1, r"answered 400 \(pushing the release: a fault on purpose\)\. Correct what it names"),
    ],
)
def test_a_refusal_is_one_message_with_the_fix(
    hub: LoopbackHub, student: Path, path: str, status: int, times: int, message: str
) -> None:
    hub.fail(path, status, times=times)
    with pytest.raises(HubError, match=message):
        push(student)
    hub.faults.clear()
    push(student)  # nothing is lost: the same call ends well
    assert "model.safetensors" in hub.files(NAME)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"repo_id": "me/my student"}, "repo_id: Repo id must use alphanumeric"),
        ({"repo_id": "me/a--b"}, "repo_id: Cannot have -- or"),
        ({"repo_id": "student"}, "repo_id: 'student' is no Hub id"),
        ({"license": "Apache 2"}, "license: 'Apache 2' is no identifier of the Hub's list"),
        ({"tag": "v 1"}, "tag: git takes no name such as 'v 1'"),
        ({"tag": "-v1"}, "tag: git takes no name"),
        ({"revision": "a..b"}, "revision: git takes no name"),
        ({"language": ["english"]}, "language: 'english' is no code of ISO 639"),
        ({"language": "en-GB"}, "language: 'en-GB' is no code"),
        ({"datasets": ["my data"]}, "datasets: Repo id must use alphanumeric"),
        ({"base_model": "me/a--b"}, "base_model: Cannot have -- or"),
    ],
)
def test_a_dry_run_refuses_what_the_hub_would(
    student: Path, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    facts = {name: value for name, value in changed.items() if name in vars(FACTS)}
    others = {name: value for name, value in changed.items() if name not in facts}
    options = {"repo_id": NAME, "facts": replace(FACTS, **facts), **others, "dry_run": True}
    with pytest.raises(ValueError, match=message):
        release(student, **options)
    if not facts:
        with pytest.raises(ValueError, match=message):
            INDEX.push_to_hub(**{"repo_id": "me/index", "license": "mit", **others})
    if facts:  # the same of a written card
        data = {"license": "mit", "base_model": "me/it", "library_name": "sentence-transformers", **facts}
        (tmp_path / "card.md").write_text(f"---\n{json.dumps(data)}\n---\n# it\n")
        with pytest.raises(ValueError, match=f"card.md: {message}"):
            release(student, NAME, card=tmp_path / "card.md", dry_run=True)


def test_a_token_that_may_not_or_is_missing(hub: LoopbackHub, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for token, message in (("hf_nobody", "401|no such"), (READER, "403"), (STRANGER, "403")):
        with pytest.raises(HubError, match=message):
            push(student, token=token)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"there is no token .*log in with `hf auth login`"):
        push(student)
    assert not hub.repos
    hub.fail("tester/gated", 403, times=9, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(HubError, match=r"gated .*Accept the terms on its page, then log in"):
        load_student("tester/gated")


def test_a_stale_parent_loses_nobodys_work(hub: LoopbackHub, student: Path) -> None:
    push(student)

    def somebody_pushes(method: str, path: str) -> None:
        if "/commit/" in path:
            hub.on_request = None
            HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo="theirs.txt", repo_id=NAME)

    hub.on_request = somebody_pushes
    changed = replace(FACTS, limits=["Another."])
    with pytest.raises(HubError, match=r"412.*Somebody else has pushed meanwhile"):
        push(student, facts=changed)
    push(student, facts=changed)
    files = hub.files(NAME)
    assert files["theirs.txt"] == b"theirs" and b"Another." in files["README.md"]


def test_a_cut_connection_leaves_no_half_release(
    hub: LoopbackHub, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fail("^/lfs/", None, method="PUT", times=9)
    with pytest.raises(HubError, match=r"the connection broke|answered"):
        push(student)
    assert set(hub.files(NAME)) == {".gitattributes"}
    hub.faults.clear()
    hub.fail("/commit/", None, times=9)  # the weights arrive, the commit does not
    with pytest.raises(HubError):
        push(student)
    hub.faults.clear()
    push(student)
    weights = (student / "model.safetensors").read_bytes()
    assert hub.uploaded[hashlib.sha256(weights).hexdigest()] == 1  # sent once, over all three attempts
    online = load_student(NAME, device="cpu").encode(["words"])
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # with a warm cache
    assert (load_student(NAME, device="cpu").encode(["words"]) == online).all() and not hub.requests
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set; unset it"):
        push(student)


def test_the_token_is_in_no_file_card_log_or_message(
    hub: LoopbackHub, student: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any
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
    load_student(NAME, token=WRITER, device="cpu")
    out = capfd.readouterr()
    # The client's own debug log of a request's headers shows them redacted or not at all.
    assert not any(WRITER in text for text in (*said, caplog.text, out.out, out.err, repr(done), done.loading()))
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert written and not any(WRITER.encode() in file.read_bytes() for file in written)
    assert hub.everything() and not any(WRITER.encode() in content for content in hub.everything().values())


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("settings.yaml", WRITER),
        ("student/tct_origin.json", "hf_" + "aB3" * 11),
        ("student/tokenizer_config.json", WRITER),
    ],
)
def test_a_token_in_a_file_stops_the_release(
    hub: LoopbackHub, student: Path, tmp_path: Path, name: str, secret: str
) -> None:
    shutil.copytree(student, tmp_path / "student")
    file = tmp_path / name
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(before | {"note": secret}))
    with pytest.raises(ValueError, match="holds a Hub token") as caught:
        push(tmp_path / "student", folder=tmp_path / "kept")
    named = "recipe.yaml" if name == "settings.yaml" else file.name
    assert str(caught.value).startswith(f"{named} ") and secret not in str(caught.value)
    assert not hub.requests and not (tmp_path / "kept").exists()
