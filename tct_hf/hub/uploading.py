"""Push a folder: what has changed, in one commit that also takes away what is left of an earlier one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tct_hf.files import file_digest
from tct_hf.hub.access import HubError, hub_errors
from tct_hf.hub.contents import MARKER


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    kind: str,
    private: bool | None,
    revision: str,
    tag: str | None,
    token: str | None,
    message: str,
    replaced: Callable[[str], bool],
) -> tuple[list[str], str, str]:
    """Push what has changed of a folder to a repository, in one commit, and tag it.

    Args:
        folder: all its files.
        repo_id: owner/name; made when missing.
        kind: "model" or "dataset".
        private: of a repository that is made; True of one that is there and public is refused.
        revision: branch; made when missing.
        tag: name for the commit; one that names another commit is refused before anything is sent.
        token: of the Hub.
        message: of the commit.
        replaced: whether a file, by its name, goes when the folder has it no more.

    Returns:
        Names of the files that were new or changed, the commit, the repository's URL.

    Raises:
        ValueError: the tag is taken, or the repository is public where a private one is asked for.
        HubError: the Hub refused or could not be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(token=token)
    doing = "pushing the release" if kind == "model" else "pushing the index"
    with hub_errors(repo_id, doing):
        if api.token is None and active_token() is None:
            raise HubError(
                f"{repo_id}: there is no token ({doing}); log in with `hf auth login`, set HF_TOKEN, or pass token=."
            )
        url = str(api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True))
        if private and not api.repo_info(repo_id, repo_type=kind).private:
            raise ValueError(
                f"private: {url} is there already and public, so that what is pushed would be too; make it private in "
                "its settings, name another repository, or leave private out."
            )
        if revision != "main":
            api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
        head = str(api.repo_info(repo_id, repo_type=kind, revision=revision).sha)
        there = {
            entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
            for entry in api.list_repo_tree(repo_id, repo_type=kind, revision=head, recursive=True)
            if isinstance(entry, RepoFile)
        }
        files = files_of(folder)
        gone = [name for name in there if name not in files and replaced(name)]
        sent = [name for name in files if there.get(name) not in _hashes(folder / name)]
        taken: str | None = None
        if tag is not None:
            tags = api.list_repo_refs(repo_id, repo_type=kind).tags
            taken = next((one.target_commit for one in tags if one.name == tag), None)
            if taken is not None and (sent or gone or taken != head):
                raise ValueError(
                    f"tag: {repo_id} has a tag {tag} already, of the commit {taken[:12]}, and a tag does not move; "
                    "choose the next one."
                )
        commit = head
        if sent or gone:
            info: Any = api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, folder / name) for name in sent),
                    *(CommitOperationDelete(name) for name in gone),
                ],
                repo_type=kind,
                revision=revision,
                commit_message=message,
                parent_commit=head,
            )
            commit = str(info.oid)
        if tag is not None and taken is None:
            api.create_tag(repo_id, tag=tag, revision=commit, repo_type=kind)
    return sent, commit, url


def files_of(folder: Path) -> list[str]:
    """Names of all files of a folder that are pushed."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name != MARKER)


def active_token() -> str | None:
    """The token that the client would use, None where nobody is logged in."""
    from huggingface_hub import get_token

    return get_token()


def _hashes(file: Path) -> set[str]:
    """What the Hub may call this content: its sha256 where it lies in LFS, its git hash elsewhere."""
    git = hashlib.sha1(f"blob {file.stat().st_size}\0".encode())
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            git.update(block)
    return {git.hexdigest(), str(file_digest(file))}
