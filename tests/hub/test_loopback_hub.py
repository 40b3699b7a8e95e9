"""The Hub that the other tests talk to, through the real client."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from tests.loopback_hub import READER, STRANGER, LoopbackHub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    (path / "sub").mkdir(parents=True)
    (path / "README.md").write_text("---\nlicense: mit\n---\nwords\n")
    (path / "sub" / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    return path


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("part_size", [None, 1000])
def test_what_is_pushed_comes_back(hub: LoopbackHub, folder: Path, kind: str, part_size: int | None) -> None:
    hub.part_size = part_size
    api = HfApi()
    api.create_repo("tester/a", repo_type=kind)
    api.upload_folder(repo_id="tester/a", folder_path=folder, repo_type=kind)
    back = Path(snapshot_download("tester/a", repo_type=kind))
    for file in ("README.md", "sub/weights.safetensors"):
        assert (back / file).read_bytes() == (folder / file).read_bytes()


def test_nothing_is_sent_twice(hub: LoopbackHub, folder: Path) -> None:
    api = HfApi()
    api.create_repo("tester/a")
    for _ in range(2):
        api.upload_folder(repo_id="tester/a", folder_path=folder)
    weights = hashlib.sha256((folder / "sub" / "weights.safetensors").read_bytes()).hexdigest()
    assert hub.uploaded == {"README.md": 1, weights: 1}


def test_a_tag_pins_what_was_there(hub: LoopbackHub, folder: Path) -> None:
    api = HfApi()
    api.create_repo("tester/a")
    api.upload_folder(repo_id="tester/a", folder_path=folder)
    api.create_tag("tester/a", tag="v1.0")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nothers\n")
    api.upload_folder(repo_id="tester/a", folder_path=folder)
    assert "words" in Path(hf_hub_download("tester/a", "README.md", revision="v1.0")).read_text()
    assert "others" in Path(hf_hub_download("tester/a", "README.md")).read_text()


def test_who_may_what(hub: LoopbackHub, folder: Path) -> None:
    HfApi().create_repo("tester/a", private=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=READER).upload_folder(repo_id="tester/a", folder_path=folder)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=STRANGER).model_info("tester/a")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_nobody").whoami()
    assert HfApi(token=READER).model_info("tester/a").private


def test_a_stale_parent_is_refused(hub: LoopbackHub, folder: Path) -> None:
    api = HfApi()
    api.create_repo("tester/a")
    first = api.model_info("tester/a").sha
    api.upload_folder(repo_id="tester/a", folder_path=folder)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="tester/a", parent_commit=first)
