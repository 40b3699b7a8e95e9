"""Release a checkpoint: check it, write its card, push what has changed, without paths or tokens of this machine."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import sentence_transformers
import yaml
from huggingface_hub import ModelCard, get_token

from tct_hf.data.collection import Collection
from tct_hf.encoding.checkpoint import (
    GOLDEN_TEXTS,
    check_vectors,
    finalise_checkpoint,
    own_vectors,
    validate_checkpoint,
)
from tct_hf.encoding.export import ENCODING_FILE, Format, check_exports, export
from tct_hf.encoding.kinds import ORIGIN_FILE, STARTING, TRAINING_FILE, read_json, read_modules, recognise
from tct_hf.encoding.weights import weights_digest
from tct_hf.evaluation.report import Report
from tct_hf.files import command, replace_dir, staging_beside, write_json_atomic, write_text_atomic, writing
from tct_hf.hub.cards import FAMILIES, CardFacts, Family, write_card
from tct_hf.hub.graphs import graph_section
from tct_hf.hub.space import write_space
from tct_hf.hub_client import MARKER, check_hub_names, check_metadata, files_of, push_folder

RECIPE = "recipe.yaml"
FIGURES = ("report.json", "report.md", "latency.png", "storage.png")

# The parts of a checkpoint; every other file stays at home and is listed.
_MODULE = (
    r"(config\.json|sentence_bert_config\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(txt|json)|merges\.txt"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json)"
)
_PARTS = re.compile(
    rf"{_MODULE}|README\.md|modules\.json|config_sentence_transformers\.json"
    rf"|{re.escape(TRAINING_FILE)}|{re.escape(ORIGIN_FILE)}|\d+_\w+/(config\.json|model\.safetensors)"
    # The modules of a Router, such as query_0_SparseStaticEmbedding.
    rf"|router_config\.json|[\w-]+_\d+_[A-Z]\w*/{_MODULE}"
    rf"|{re.escape(ENCODING_FILE)}|onnx/model(_int8)?\.onnx|openvino/openvino_model(_int8)?\.(xml|bin)"
)
# What others may have put into the repository before: weights that would be loaded instead of the new ones, code, and
# what a training that pushes leaves, pickles among it.
_STALE = re.compile(
    r"model.*\.safetensors|(.*/)?pytorch_model[^/]*\.bin|(.*/)?[^/]*\.py|training_args\.bin|trainer_state\.json"
    r"|(optimizer|scheduler|scaler|rng_state)[^/]*|(last-checkpoint|checkpoint-\d+)/.*"
)

_TOKEN = re.compile(rb"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}")
_PATH = re.compile(r"(?:/|~[\w.-]*/|\.\./|[A-Za-z]:[\\/]|\\\\|file://)\S.*")
_PATH_IN_TEXT = re.compile(
    r"(?<![\w.:/~<-])(?:~[\w.-]*|\.\.)?(?:/[^\s/\"'`,;|\[\]{}()<>]+){2,}/?"
    r"|(?<![\w./~<-])(?:~[\w.-]*|\.\.)/[^\s\"'`,;|\[\]{}()<>]+"
)
# Where transformers writes what a model was loaded from.
_LOADED_FROM = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".h5", ".msgpack", ".ot")


@dataclass(frozen=True)
class Release:
    """What :func:`release` did, or would do."""

    repo_id: str
    family: Family
    sent: list[str]
    unchanged: list[str]
    left_out: list[str]
    url: str | None = None
    commit: str | None = None
    tag: str | None = None
    folder: Path | None = None
    space_url: str | None = None

    def loading(self) -> str:
        """The lines that load it, pinned to the tag or the commit."""
        pin = self.tag or self.commit
        revision, loader = f', revision="{pin}"' if pin else "", FAMILIES[self.family].loader
        return f'from sentence_transformers import {loader}\n\nmodel = {loader}("{self.repo_id}"{revision})'


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
    space: str | None = None,
    collection: Collection | None = None,
    onnx: bool = False,
    openvino: bool = False,
    int8: bool = False,
    int8_dev: bool = False,
) -> Release:
    """Check a checkpoint, write its card, and push it with evaluation results and recipe, as docs/hub.md says.

    A TCT student's vectors are compared with the rule in a fresh interpreter (:func:`tct_hf.validate_checkpoint`),
    those of other students with what the checkpoint gives here, and a teacher must load there. A second call sends
    only what has changed, and deletes what an earlier release or a training that pushed had and this one has not.

    Args:
        path: the checkpoint: a student, a ColBERT teacher or a sparse student.
        repo_id: owner/name; made when missing.
        facts: facts for the card; the record of the training beside the checkpoint completes them.
        report: report.json of an evaluation of this model, or its folder; its figures go into the card.
        recipe: settings.yaml of the training; by default the one beside the checkpoint, where there is one.
        card: a written card to use as it is, instead of the template.
        private: whether a new repository is private; None: the account's setting. One that exists stays as it is;
            with True a public one is refused.
        revision: branch to push to; made when missing.
        tag: tag for the commit, such as "v1.0". A tag never moves.
        token: token for the Hub; the logged-in one when None.
        dry_run: make all checks, also of names, licence and languages that the Hub would refuse; push nothing.
        folder: folder to keep what is pushed in, instead of an earlier release; any other content is refused.
        message: commit message.
        space: owner/name of a Space to push beside it: a page that searches `collection` with the student. Its
            passages are then as public as the Space; `private` holds for it too. A dry run with `folder` writes it
            to a folder of the same name with "-space".
        collection: what the Space searches, and `int8_dev` is measured on.
        onnx: add its ONNX graph, by :func:`tct_hf.export`; graphs it holds go along. All are compared with it.
        openvino: add its OpenVINO graph.
        int8: add these files in int8, too.
        int8_dev: measure their RR@10 on dev of `collection`, for the card.

    Returns:
        What was done.

    Raises:
        ValueError: the checkpoint is not fit to be released, the card is not complete, the Hub takes no such name,
            licence or language, a file holds a token, or the repository is public where a private one is asked for.
        FileExistsError: the folder holds something other than an earlier release.
        FileNotFoundError: the checkpoint, report, recipe or card is missing.
        HubError: the Hub refused or could not be reached; run it again, what has arrived is not sent again.
    """
    source = Path(path).expanduser()
    check_hub_names(repo_id, revision, tag)
    facts = facts or CardFacts()
    if card is None:
        check_metadata(vars(facts))
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: there is no such checkpoint folder.")
    family = _family(source)
    if space is not None:
        check_hub_names(space, "main", None)
        if collection is None or family == "teacher":
            raise ValueError("space: it serves a student and what that searches; release a student, with collection=.")
    if (onnx or openvino) and family != "student":
        raise ValueError(f"onnx, openvino: {source} is a {family.replace('_', ' ')}; only dense students have any.")
    if int8 and not (onnx or openvino):
        raise ValueError("int8: of which file? Set onnx or openvino, too.")
    if int8_dev and (not int8 or collection is None or card is not None):
        raise ValueError("int8_dev: it needs int8, a collection to measure on, and no card of your own.")
    kept = None if folder is None else check_folder(folder, source)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        staging = scratch / "release" if kept is None else stack.enter_context(staging_beside(kept))
        stack.enter_context(writing(staging))
        left_out = copy_parts(source, staging)
        _add(staging, source, report, recipe)
        if not any(staging.rglob("*.safetensors")):
            pickled = next((f", only the pickle {name}" for name in left_out if name.endswith(_PICKLES)), "")
            raise ValueError(f"{source}: no weights in safetensors{pickled}; save it again with save_student.")
        cut_local_paths(staging)
        asked: dict[Format, bool] = {"onnx": onnx, "openvino": openvino}
        for format, small in product((name for name in asked if asked[name]), (False, True)[: 1 + int8]):
            export(sentence_transformers.SentenceTransformer(str(staging), device="cpu"), staging, format, int8=small)
        graphs = graph_section(staging, _check(staging, family, source), collection if int8_dev else None)
        if (measured := None if report is None else Report.load(staging / "report.json")) is not None:
            _check_report(measured, staging, family)
        if card is None:
            facts = facts.completed_by(source)
            text = write_card(staging, family, repo_id, facts, report=measured, tag=tag, graphs=graphs)
        else:
            text = _written_card(Path(card))
        write_text_atomic(staging / "README.md", text)
        refuse_tokens(staging, secret := token or get_token())
        files = files_of(staging)
        if kept is not None:
            mark(staging, files)
            staging = kept = replace_dir(staging, kept)
        done = Release(repo_id, family, files, [], left_out, tag=tag, folder=kept)
        account: dict[str, Any] = {"private": private, "token": token}
        if not dry_run:
            said = message or f"Release {tag or repo_id.split('/')[1]}"
            at: dict[str, Any] = {**account, "revision": revision, "tag": tag}
            sent, commit, url = push_folder(staging, repo_id, "model", said, is_replaced, **at)
            rest = [name for name in files if name not in sent]
            done = replace(done, sent=sent, unchanged=rest, commit=commit, url=url)
        if space is None or collection is None or (dry_run and kept is None):
            return done
        place = check_folder(f"{kept}-space", source) if dry_run else scratch / "space"
        with staging_beside(place) as page:
            write_space(page, space.split("/")[1], source, collection, repo_id, done.commit or tag or "main")
            refuse_tokens(page, secret)
            if dry_run:
                mark(page, files_of(page))
                replace_dir(page, place)
                return done
            said = f"Search with {repo_id}"
            *_, url = push_folder(page, space, "space", said, re.compile("(tct_hf|indexes)/").match, **account)
        return replace(done, space_url=url)


def _family(source: Path) -> Family:
    found = recognise(str(source), source)
    family = next((family for family, of in FAMILIES.items() if found.kind in of.kinds), None)
    if family is None or (source / "artifact.metadata").is_file():
        raise ValueError(
            f"{source}: {found.why}; a release is a student or a ColBERT saved by sentence-transformers: use "
            "convert_checkpoint first."
        )
    return family


def _add(staging: Path, source: Path, report: str | Path | None, recipe: str | Path | None) -> None:
    if report is not None:
        place = Path(report) if Path(report).is_dir() else Path(report).parent
        if not (place / "report.json").is_file():
            raise FileNotFoundError(f"{place / 'report.json'}: no such report; make one with {command('evaluate')}.")
        for name in FIGURES:
            if (place / name).is_file():
                shutil.copyfile(place / name, staging / name)
    settings = source.parent / "settings.yaml" if recipe is None else Path(recipe)
    if settings.is_file():
        shutil.copyfile(settings, staging / RECIPE)
    elif recipe is not None:
        raise FileNotFoundError(f"{settings}: no such recipe.")


def _check(staging: Path, family: Family, source: Path) -> dict[str, float]:  # as `check_exports` says
    modules = read_modules(staging)
    for module in modules:
        if not module["type"].startswith("sentence_transformers."):
            raise ValueError(
                f"modules.json, router_config.json: the module {module['type']} is not one of sentence-transformers, "
                "and would need trust_remote_code; use stock modules."
            )
    if (read_json(staging / ORIGIN_FILE) or {}).get("made") == STARTING:
        raise ValueError(f"{ORIGIN_FILE}: this is a student to start from, not trained for its encoding; train it")
    for name in sorted({"config.json", *((Path(module["path"]) / "config.json").as_posix() for module in modules)}):
        if "auto_map" in (read_json(staging / name) or {}):
            raise ValueError(f"{name}: auto_map names code to run on loading; use an encoder of transformers itself.")
    if family == "student" and recognise(str(staging), staging).kind == "student":
        finalise_checkpoint(staging)
        return validate_checkpoint(staging).exports
    loader, than = FAMILIES[family].loader, f"those of {source} here"
    here = {} if family == "teacher" else own_vectors(source, loader)
    check_vectors(staging, here, loader=loader, tolerance=1e-4, than=than, fix="Save it again with stock modules.")
    if family == "student":
        return check_exports(staging, GOLDEN_TEXTS, here)
    if family == "sparse_student" and not all(vectors.any() for vectors in here.values()):
        raise ValueError(
            f"{source}: all vectors are zero in all dimensions: the student has collapsed; train it with a weaker "
            "regulariser."
        )
    return {}


def _check_report(report: Report, staging: Path, family: Family) -> None:
    # A sparse student may be the only one of the report, or beside a dense one.
    role = "student" if family == "sparse_student" and not report.models.get(family) else family
    measured = report.models.get(role) or {}
    model = getattr(sentence_transformers, FAMILIES[family].loader)(str(staging), device="cpu")
    if measured.get("weights_sha256") != weights_digest(model):
        name, kind = measured.get("name"), role.replace("_", " ")
        raise ValueError(
            f"report: it measured {f'the {kind} {name!r}' if name else f'no {kind}'}, whose weights are not those of "
            f"this checkpoint; evaluate this one with {command('evaluate')}, or leave report out."
        )


def _written_card(card: Path) -> str:
    text = card.read_text(encoding="utf-8")
    try:
        data = ModelCard(text).data.to_dict()
    except ValueError as error:
        raise ValueError(f"{card}: its metadata can't be read ({error}).") from error
    if wrong := [name for name in ("license", "base_model", "library_name") if not data.get(name)]:
        raise ValueError(f"{card}: the card is not complete: its metadata lack {', '.join(wrong)}.")
    check_metadata(data, f"{card}: ")
    return text


def is_replaced(name: str) -> bool:
    """Whether a file in the repository goes when the release has none of this name."""
    return bool(_PARTS.fullmatch(name) or name in (RECIPE, *FIGURES) or _STALE.fullmatch(name))


def check_folder(folder: str | Path, source: Path) -> Path:
    """The folder that a release of the checkpoint `source` is kept in, with the home directory in full."""
    place = Path(folder).expanduser()
    kept, checkpoint = place.resolve(), source.resolve()
    if kept.is_relative_to(checkpoint) or checkpoint.is_relative_to(kept):
        raise ValueError(f"folder (--output_dir): {place} and {source} lie in one another; name another one.")
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"folder (--output_dir): {place} is a file; name a folder.")
    known = {MARKER, *((read_json(place / MARKER) or {}).get("files") or [])}
    others = sorted({file.relative_to(place).as_posix() for file in place.rglob("*") if not file.is_dir()} - known)
    if others:
        raise FileExistsError(
            f"folder (--output_dir): {place} holds {others[0]}, which no earlier release put there; name another."
        )
    return place


def mark(folder: Path, files: Sequence[str]) -> None:
    """Leave the names of a release's files in its folder, for :func:`check_folder`; the mark itself is not pushed."""
    write_json_atomic(folder / MARKER, {"files": list(files)})


def copy_parts(source: Path, staging: Path) -> list[str]:
    """Copy the parts of a checkpoint except its card to a new folder; the names of the files that are no part."""
    staging.mkdir(parents=True)
    left_out = []
    for name in files_of(source):
        if not _PARTS.fullmatch(name):
            left_out.append(name)
        elif name != "README.md":  # written anew
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, staging / name)
    return left_out


def cut_local_paths(staging: Path) -> None:
    """Cut the paths of this machine in all files of a release that may name any; see :func:`without_local_paths`."""
    for file in filter(Path.is_file, (staging / name for name in (RECIPE, ORIGIN_FILE, *FIGURES[:2]))):
        try:
            text = file.read_text(encoding="utf-8")
            cut = without_local_paths(text, file.suffix)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{file.name} can't be read ({why}); give it as the run wrote it.") from error
        if cut != text:
            write_text_atomic(file, cut)
    for file in [*staging.rglob("config.json"), *staging.rglob("tokenizer_config.json")]:
        content = read_json(file)
        named = {key: content[key] for key in _LOADED_FROM if key in content}
        if named != (cut_names := _cut_values(named)):
            write_json_atomic(file, content | cut_names)


def without_local_paths(text: str, suffix: str = ".yaml") -> str:
    """A text with absolute paths, and those that begin with ~ or .., cut to their last name: they name people."""
    if suffix == ".json":
        content = json.loads(text)
        cut = _cut_values(content)
        return text if cut == content else json.dumps(cut, indent=2, ensure_ascii=False) + "\n"
    if suffix in (".yaml", ".yml"):
        content = yaml.safe_load(text)
        if (cut := _cut_values(content)) != content:
            text = yaml.safe_dump(cut, sort_keys=False, allow_unicode=True)
    return _PATH_IN_TEXT.sub(lambda found: _last_name(found[0]), text)


def _cut_values(content: Any) -> Any:
    if isinstance(content, str):
        whole = _PATH.fullmatch(content)
        return _last_name(content) if whole else _PATH_IN_TEXT.sub(lambda found: _last_name(found[0]), content)
    if isinstance(content, list):
        return [_cut_values(item) for item in content]
    if isinstance(content, dict):
        return {_cut_values(key): _cut_values(item) for key, item in content.items()}
    return content


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def refuse_tokens(staging: Path, token: str | None) -> None:
    """Refuse a release that has a Hub token in a file, or `token`, whatever its form."""
    for name in files_of(staging):
        with (staging / name).open("rb") as opened:  # of weights their header
            weights = name.endswith(".safetensors")
            content = opened.read(int.from_bytes(opened.read(8), "little") if weights else -1)
        if _TOKEN.search(content) or (token and token.encode() in content):
            raise ValueError(
                f"{name} holds a Hub token: take it out where the file comes from (HF_TOKEN gives it), and revoke it "
                "if anybody else has seen it."
            )
