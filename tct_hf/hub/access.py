"""Reach the Hub, and say what to do where that fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from tct_hf.bundled import resolve_model

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
