"""Release a checkpoint: check it, write its card, push what has changed, tag it, say how to load it."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.encoding.convert import ORIGIN_FILE, STARTING
from tct_hf.encoding.kinds import read_json, read_modules, recognise
from tct_hf.files import replace_dir, staging_beside, write_text_atomic
from tct_hf.hub.cards import CardFacts, Family, write_card
from tct_hf.hub.contents import (
    FIGURES,
    RECIPE,
    check_folder,
    copy_parts,
    cut_local_paths,
    is_replaced,
    mark,
    refuse_tokens,
)
from tct_hf.hub_client import active_token, files_of, push_folder

if TYPE_CHECKING:
    from tct_hf.evaluation.report import Report

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".h5", ".msgpack", ".ot")
_ORIGIN = "sentence_transformers."

_LOADER = """
import sys
sys.modules["tct_hf"] = None
import numpy as np, torch, sentence_transformers
model = getattr(sentence_transformers, sys.argv[2])(sys.argv[1], device="cpu")
found = model.encode_query(["a question"]), model.encode_document(["a passage of some words"])
for number, vectors in enumerate(found):
    dense = vectors.to_dense() if isinstance(vectors, torch.Tensor) and vectors.is_sparse else vectors[0]
    assert torch.isfinite(torch.as_tensor(np.asarray(dense))).all(), "vectors that are not finite"
    np.save(f"{sys.argv[3]}/{number}.npy", np.asarray(dense))
"""


@dataclass(frozen=True)
class Release:
    """What :func:`release` did, or would do.

    Attributes:
        repo_id: where.
        family: "student", "sparse_student" or "teacher".
        sent: files that are new or changed.
        unchanged: files that are there already.
        left_out: files of the folder that are no part of a checkpoint.
        url: of the repository; None of a dry run.
        commit: the revision that holds it; None of a dry run.
        tag: that names it.
        folder: what was or would be pushed, where it was kept.
    """

    repo_id: str
    family: Family
    sent: list[str]
    unchanged: list[str]
    left_out: list[str]
    url: str | None = None
    commit: str | None = None
    tag: str | None = None
    folder: Path | None = None

    def loading(self) -> str:
        """The lines that load it, pinned to the tag or the commit."""
        name = {"student": "SentenceTransformer", "sparse_student": "SparseEncoder", "teacher": "MultiVectorEncoder"}
        pin = self.tag or self.commit
        revision = f', revision="{pin}"' if pin else ""
        of = name[self.family]
        return f'from sentence_transformers import {of}\n\nmodel = {of}("{self.repo_id}"{revision})'


def release(
    path: str | Path,
    repo_id: str,
    *,
    facts: CardFacts | None = None,
    report: str | Path | None = None,
    recipe: str | Path | None = None,
    card: str | Path | None = None,
    private: bool | None = None,
    revision: str = "main",
    tag: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    folder: str | Path | None = None,
    message: str | None = None,
) -> Release:
    """Check a checkpoint, write its card, and push it with evaluation results and recipe.

    Before anything is sent: a student's vectors are compared with the rule in a fresh interpreter
    (:func:`tct_hf.validate_checkpoint`), those of a sparse student or a dense one of another encoding with what the
    checkpoint gives here, a teacher is loaded there; no module may be of a class from elsewhere;
    no file may hold a Hub token; the card must be complete. Only the parts of a checkpoint are copied, so that no
    pickle and no code is pushed, and paths of this machine are cut to their last name in what goes along.

    A second call sends what has changed and nothing else. What an earlier release had and this one has not is deleted
    in the same commit, and so are, with other weights, code and pickles, the folders `last-checkpoint` and
    `checkpoint-N` of a training that pushed to the same branch: they stay in its history.

    Args:
        path: the checkpoint: a student, a ColBERT teacher or a sparse student.
        repo_id: owner/name; made when missing.
        facts: of the card; what they leave open is taken from the record of the training beside the checkpoint.
        report: report.json of an evaluation of this model, or its folder; its figures go into the card.
        recipe: settings.yaml of the training; by default the one beside the checkpoint, where there is one.
        card: a written card to use as it is, in place of the template.
        private: of a repository that is made; None: the account's setting. One that exists stays as it is; with True
            a public one is refused.
        revision: branch to push to; made when missing.
        tag: name for the commit, such as "v1.0". A tag never moves.
        token: of the Hub; the one logged in with when None.
        dry_run: check and write everything, push nothing.
        folder: keep what is pushed here, in place of an earlier release; any other content is refused.
        message: of the commit.

    Returns:
        What was done.

    Raises:
        ValueError: the checkpoint is not fit to be released, the card is not complete, a file holds a token, or the
            repository is public where a private one is asked for; says the mend.
        FileExistsError: the folder holds something other than an earlier release.
        FileNotFoundError: the checkpoint, report, recipe or card is missing.
        HubError: the Hub refused or could not be reached; run it again, what has arrived is not sent again.
        OSError: the folder can't be written.
    """
    source = Path(path).expanduser()
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id: {repo_id!r} is no Hub id; write owner/name.")
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: there is no such checkpoint folder.")
    family = _family(source)
    if folder is not None:
        folder = check_folder(folder, source)
    with ExitStack() as stack:
        if folder is None:
            staging = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "release"
        else:
            staging = stack.enter_context(staging_beside(folder))
        try:
            left_out = copy_parts(source, staging)
            _check_weights(source, staging, left_out)
            _add(staging, source, report, recipe)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(
                    errno.ENOSPC,
                    f"the disk is full: a release is written aside first and takes {_megabytes(source)} MB; make room "
                    "there, or name another folder= (or TMPDIR)",
                    str(staging),
                ) from error
            raise
        _check(staging, family, source)
        if report is not None:
            _check_report(staging, family)
        write_text_atomic(staging / "README.md", _card(staging, source, family, repo_id, facts, report, card, tag))
        refuse_tokens(staging, token or active_token())
        files = files_of(staging)
        kept = None
        if folder is not None:
            mark(staging, files)
            staging = kept = replace_dir(staging, folder)
        if dry_run:
            return Release(repo_id, family, files, [], left_out, tag=tag, folder=kept)
        return _push(staging, repo_id, family, files, left_out, private, revision, tag, token, message, kept)


def _family(source: Path) -> Family:
    found = recognise(str(source), source)
    families: dict[str, Family] = {
        "student": "student",
        "dual-encoder": "student",
        "colbert": "teacher",
        "sparse": "sparse_student",
    }
    if found.kind not in families:
        raise ValueError(
            f"{source}: {found.why}; a release is a student, a ColBERT teacher or a sparse student saved by "
            "sentence-transformers. Convert a bare encoder with convert_checkpoint first."
        )
    if (source / "artifact.metadata").is_file():
        raise ValueError(f"{source}: a checkpoint of the Stanford code; write it anew with convert_checkpoint first.")
    return families[found.kind]


def _check_weights(source: Path, staging: Path, left_out: Sequence[str]) -> None:
    if not any(staging.rglob("*.safetensors")):
        pickled = [name for name in left_out if name.endswith(_PICKLES)]
        found = f", only the pickle {pickled[0]}" if pickled else ""
        raise ValueError(f"{source}: no weights in safetensors{found}; save it anew with save_student.")


def _add(staging: Path, source: Path, report: str | Path | None, recipe: str | Path | None) -> None:
    """The evaluation and the recipe, beside the weights."""
    if report is not None:
        place = Path(report)
        json_file = place / "report.json" if place.is_dir() else place
        if not json_file.is_file():
            raise FileNotFoundError(f"{json_file}: no such report; make one with recipes/evaluate.py.")
        for name in FIGURES:
            if (json_file.parent / name).is_file():
                shutil.copyfile(json_file.parent / name, staging / name)
    settings = Path(recipe) if recipe is not None else source.parent / "settings.yaml"
    if settings.is_file():
        shutil.copyfile(settings, staging / RECIPE)
    elif recipe is not None:
        raise FileNotFoundError(f"{settings}: no such recipe.")
    cut_local_paths(staging)


def _check(staging: Path, family: Family, source: Path) -> None:
    from tct_hf.encoding.checkpoint import finalise_checkpoint, validate_checkpoint

    modules = read_modules(staging)
    for module in modules:
        if not module["type"].startswith(_ORIGIN):
            raise ValueError(
                f"modules.json, router_config.json: the module {module['type']} is not one of sentence-transformers, "
                "so that loading it would need trust_remote_code; use stock modules."
            )
    if (read_json(staging / ORIGIN_FILE) or {}).get("made") == STARTING:
        raise ValueError(
            f"{ORIGIN_FILE}: this is a student to start from, not trained for its encoding; train it, then "
            "release what comes out."
        )
    for name in sorted({"config.json", *((Path(module["path"]) / "config.json").as_posix() for module in modules)}):
        if "auto_map" in (read_json(staging / name) or {}):
            raise ValueError(f"{name}: auto_map names code to run on loading; use an encoder of transformers itself.")
    if family == "student" and recognise(str(staging), staging).kind == "student":
        finalise_checkpoint(staging)
        validate_checkpoint(staging)
        return
    loader = {"student": "SentenceTransformer", "teacher": "MultiVectorEncoder", "sparse_student": "SparseEncoder"}
    with tempfile.TemporaryDirectory() as found:
        command = [sys.executable, "-c", _LOADER, str(staging.resolve()), loader[family], found]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(
                f"the checkpoint does not load as a plain {loader[family]}:\n{done.stderr.strip()[-2000:]}"
            )
        if family != "teacher":
            _check_vectors(source, Path(found), sparse=family == "sparse_student")


def _check_vectors(source: Path, found: Path, *, sparse: bool) -> None:
    """Refuse a student that gives other vectors in a fresh interpreter than here, or none."""
    import numpy as np
    from sentence_transformers import SentenceTransformer, SparseEncoder

    model: Any = (SparseEncoder if sparse else SentenceTransformer)(str(source), device="cpu")
    for number, (task, encode) in enumerate((("query", model.encode_query), ("passage", model.encode_document))):
        text = ("a question", "a passage of some words")[number]
        here, there = encode([text]), np.load(found / f"{number}.npy")
        here = here.to_dense().numpy() if sparse else here[0]
        if here.shape != there.shape or not np.allclose(here, there, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"the {task} vector of {text!r} is another in a fresh interpreter than that of {source}: a file of "
                "the checkpoint is not one that a release carries; save it anew with stock modules."
            )
        if sparse and not here.any():
            raise ValueError(
                f"the {task} vector of {text!r} is zero in all dimensions: the student has collapsed; train it with "
                "a weaker regulariser or a longer warm-up of it."
            )


def _card(
    staging: Path,
    source: Path,
    family: Family,
    repo_id: str,
    facts: CardFacts | None,
    report: str | Path | None,
    card: str | Path | None,
    tag: str | None,
) -> str:
    from huggingface_hub import ModelCard

    if card is not None:
        text = Path(card).read_text(encoding="utf-8")
        try:
            data = ModelCard(text).data.to_dict()
        except ValueError as error:
            raise ValueError(f"{card}: its metadata can't be read ({error}).") from error
        if wrong := [name for name in ("license", "base_model", "library_name") if not data.get(name)]:
            raise ValueError(f"{card}: the card is not complete: its metadata lack {', '.join(wrong)}.")
        return text
    return write_card(
        staging,
        family,
        repo_id,
        (facts or CardFacts()).completed_by(source),
        report=_load_report(staging) if report is not None else None,
        tag=tag,
    )


def _load_report(staging: Path) -> Report:
    from tct_hf.evaluation.report import Report

    return Report.load(staging / "report.json")


def _check_report(staging: Path, family: Family) -> None:
    """Refuse the figures of another model."""
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

    from tct_hf.retrieval.encode import describe_model
    from tct_hf.teachers.colbert import describe_teacher

    models = _load_report(staging).models
    role = family
    if family == "teacher":
        weights = describe_teacher(MultiVectorEncoder(str(staging), device="cpu"))["weights"]
    elif family == "student":
        weights = describe_model(SentenceTransformer(str(staging), device="cpu"))["model"]["weights_sha256"]
    else:
        weights = describe_model(SparseEncoder(str(staging), device="cpu"))["model"]["weights_sha256"]
        # It may be the only student of the report, or the one beside a dense one.
        role = "sparse_student" if models.get("sparse_student") else "student"
    measured = models.get(role) or {}
    if measured.get("weights_sha256") != weights:
        name, kind = measured.get("name"), role.replace("_", " ")
        raise ValueError(
            f"report: it measured {f'the {kind} {name!r}' if name else f'no {kind}'}, whose weights are not those of "
            "this checkpoint; evaluate this one with recipes/evaluate.py, or leave report out."
        )


def _push(
    staging: Path,
    repo_id: str,
    family: Family,
    files: Sequence[str],
    left_out: list[str],
    private: bool | None,
    revision: str,
    tag: str | None,
    token: str | None,
    message: str | None,
    kept: Path | None,
) -> Release:
    sent, commit, url = push_folder(
        staging,
        repo_id,
        kind="model",
        private=private,
        revision=revision,
        tag=tag,
        token=token,
        message=message or f"Release {tag or repo_id.split('/')[1]}",
        replaced=is_replaced,
    )
    unchanged = [name for name in files if name not in sent]
    return Release(repo_id, family, sent, unchanged, left_out, url, commit, tag, kept)


def _megabytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 1_000_000 + 1
