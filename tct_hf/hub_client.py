"""Reach the Hub, and say what to do where that fails."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tct_hf.bundled import resolve_model
from tct_hf.files import file_digest

# In a folder that a release was kept in; it is not pushed.
MARKER = ".tct_release.json"
_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token="


class HubError(OSError):
    """The Hub refused, could not be reached, or has not got what was asked for; the message says the mend."""


@contextmanager
def hub_errors(repo_id: str, doing: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one message with the mend.

    Args:
        repo_id: the repository that is asked.
        doing: what is tried, for the message, such as "pushing a release".

    Raises:
        HubError: in place of every error of the client or the network.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # The client has changed its HTTP library before: the class that all its errors are of is taken from its own.
    http_error: type[Exception] = next(
        cast("type[Exception]", base) for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"
    )
    try:
        yield
    except HubError:
        raise
    except (http_error, OSError, ValueError) as error:
        if (message := _message(error, repo_id, doing, http_error)) is None:
            raise
        raise HubError(message) from error
    except RuntimeError as error:  # what the client makes of a failed upload
        cause = error.__cause__
        if cause is None or (message := _message(cause, repo_id, doing, http_error)) is None:
            raise
        raise HubError(message) from error


def _message(error: BaseException, repo_id: str, doing: str, http_error: type) -> str | None:
    """What is wrong and what to do, None for an error that the Hub has no part in."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):  # a RepositoryNotFoundError too
        return f"{repo_id}: access to it is gated ({doing}). Accept the terms on its page, then {_LOG_IN}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo_id}: there is no such repository, or it is private and your token does not open it ({doing}). "
            f"Check the name; for a private one {_LOG_IN}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id}: it has no such revision ({doing}). Name a branch, a tag or a whole commit hash."
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"{repo_id}: there is no token ({doing}); {_LOG_IN}."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo_id}: {doing} needs the Hub, but HF_HUB_OFFLINE is set; unset it."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"{repo_id}: it is not in the local cache, and the Hub can't be reached ({doing}). Check the network, or "
            "unset HF_HUB_OFFLINE if it is set."
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        return f"{repo_id}: the Hub answered {status} ({doing}). {_mend(status)}"
    if isinstance(error, http_error):
        return (
            f"{repo_id}: the connection broke ({doing}: {type(error).__name__}). Run it again: what has arrived is "
            "not sent again."
        )
    return None


def _mend(status: int) -> str:
    if status == 401:
        return f"The token is missing or not valid: {_LOG_IN}."
    if status == 403:
        return "Your token may not do this: use one with write access to this owner's repositories."
    if status == 409:
        return "It exists already, or another change is under way: look at the repository, then run it again."
    if status == 412:
        return "Somebody else has pushed meanwhile: look at what they did, then run it again."
    if status == 429:
        return "Too many requests: wait some minutes, then run it again; what has arrived is not sent again."
    if status >= 500:
        return "The fault is on the Hub's side: run it again later; what has arrived is not sent again."
    return "Run it again with HF_DEBUG=1 to see the requests."


# What loading a model needs: never code, pickled weights only where there are no others.
_FILES = ["*.json", "*.txt", "*.model", "*.metadata", "*.safetensors"]
_OTHER_RUNTIMES = ["onnx/*", "openvino/*", "last-checkpoint/*", "checkpoint-*"]


def fetch_model(name_or_path: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a model: a local one as it is, a repository downloaded into the client's cache.

    Args:
        name_or_path: folder, Hub id or the name of a bundled model.
        revision: branch, tag or commit of a repository.
        token: of the Hub; the one logged in with when None.

    Returns:
        The folder. Of a repository, its name is the commit.

    Raises:
        FileNotFoundError: no folder, and no Hub id either.
        HubError: the repository can't be had.
    """
    from huggingface_hub import snapshot_download

    folder = Path(resolve_model(name_or_path)).expanduser()
    if folder.is_dir():
        return folder
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name_or_path}: there is no such folder, and it is no Hub id (owner/name) either.")

    def snapshot(patterns: Sequence[str]) -> Path:
        with hub_errors(name_or_path, "downloading the model"):
            return Path(
                snapshot_download(
                    name_or_path,
                    revision=revision,
                    token=token,
                    allow_patterns=list(patterns),
                    ignore_patterns=_OTHER_RUNTIMES,
                )
            )

    found = snapshot(_FILES)
    if not any(found.rglob("*.safetensors")):
        found = snapshot([*_FILES, "pytorch_model*.bin", "*/pytorch_model.bin"])
    return found


def fetch_checkpoint(
    repo_id: str,
    output_dir: str | Path,
    *,
    checkpoint: str = "last-checkpoint",
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Download a training checkpoint that `hub_strategy` "checkpoint" or "all_checkpoints" pushed.

    Args:
        repo_id: of the run.
        output_dir: where the run goes on; the checkpoint is put below it.
        checkpoint: its folder in the repository.
        revision: branch, tag or commit.
        token: of the Hub; the one logged in with when None.

    Returns:
        The folder, for `trainer.train(resume_from_checkpoint=...)`. It holds pickles: take it only from somebody you
        trust.

    Raises:
        HubError: the repository can't be had.
        FileNotFoundError: it holds no such checkpoint.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(repo_id, "downloading the checkpoint"):
        snapshot_download(
            repo_id, revision=revision, token=token, allow_patterns=f"{checkpoint}/*", local_dir=output_dir
        )
    folder = Path(output_dir) / checkpoint
    if not (folder / "trainer_state.json").is_file():
        raise FileNotFoundError(
            f"{repo_id}: no training checkpoint {checkpoint!r} in it; hub_strategy='checkpoint' makes one."
        )
    return folder


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


def template(name: str) -> str:
    """The text of a card template.

    Args:
        name: "student", "sparse_student" or "teacher".

    Raises:
        FileNotFoundError: the installation lacks it.
    """
    here = Path(__file__).resolve()
    # In an installed package, and in a source tree.
    places = [here.parent / "hub" / "templates" / f"{name}.md", here.parents[1] / "model_cards" / f"{name}.md"]
    for place in places:
        if place.is_file():
            return place.read_text(encoding="utf-8")
    raise FileNotFoundError(f"{places[0]}: the card template is missing; install tct_hf again.")
