"""Indexes on the Hub: a dataset repository with the index, its passage ids, its manifest and a card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.files import write_text_atomic
from tct_hf.hub_client import hub_errors, push_folder, template

if TYPE_CHECKING:
    from tct_hf.retrieval.bm25 import BM25Index
    from tct_hf.retrieval.dense import DenseIndex
    from tct_hf.retrieval.sparse import SparseIndex

# Parts of an index that was here before and has files that this one does not.
_REPLACED = re.compile(r".*\.(faiss|npy|npz|json|bin)")

_MODEL = ("model", "")  # stands for the row of the model that built an index
_TAGS = {"DenseIndex": ["faiss"], "SparseIndex": ["sparse", "splade"], "BM25Index": ["bm25"]}


@dataclass(frozen=True)
class PushedIndex:
    """Where an index went.

    Attributes:
        repo_id: the dataset repository.
        url: of it.
        commit: the revision that holds the index.
        tag: that names it.
        sent: files that were new or changed.
    """

    repo_id: str
    url: str
    commit: str
    tag: str | None
    sent: list[str]


def push_pinned(index: Any, repo_id: str, **options: Any) -> PushedIndex:
    """Push an index pinned to the revision of the model that built it; see `DenseIndex.push_to_hub`."""
    from tct_hf.retrieval.sparse import SparseIndex

    return (_push_learned_sparse if isinstance(index, SparseIndex) else _push_dense)(index, repo_id, **options)


def _push_dense(index: DenseIndex, repo_id: str, **options: Any) -> PushedIndex:
    tuned = index.tuning or {}
    rows = [
        ("dimension", str(index.dimension)),
        ("Faiss factory", f"`{index.factory}`"),
        *((name, f"{value:g}") for name, value in index.parameters.items()),
        _MODEL,
    ]
    if "recall" in tuned and "measured" in tuned:
        rows.append((f"Recall@{tuned['k']} against exact search", f"{tuned['measured']:.4f} on {tuned['source']}"))
    return _push_pinned(index, "DenseIndex", repo_id, rows, "A Faiss index", "tct_dense.json", **options)


def _push_learned_sparse(index: SparseIndex, repo_id: str, **options: Any) -> PushedIndex:
    rows = [
        ("dimension", f"{index.dimension:,}"),
        ("active dims a passage", f"{index.active_dims:,.1f}"),
        ("bytes a passage", f"{index.nbytes / len(index):,.0f}"),
        _MODEL,
    ]
    return _push_pinned(index, "SparseIndex", repo_id, rows, "Inverted lists", "tct_sparse.json", **options)


def _push_pinned(
    index: DenseIndex | SparseIndex,
    kind: str,
    repo_id: str,
    rows: Sequence[tuple[str, str]],
    what: str,
    settings_file: str,
    *,
    model_id: str | None = None,
    model_revision: str | None = None,
    **options: Any,
) -> PushedIndex:
    """Push an index with the revision of its model, which takes the place of _MODEL among the rows."""
    _check_asked(repo_id, options.get("license"))
    built_by = {key: value for key, value in (index.built_by or {}).items() if value}
    name = model_id or built_by.get("id", "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).exists():
        raise ValueError(
            f"model_id: {name or None!r} is no Hub id, but whoever loads the index has to encode queries with the "
            "model that built it: push that model first (tct_hf.release), then pass model_id=."
        )
    asked = model_revision or built_by.get("revision")
    built_by |= {"id": name, "revision": _pinned(name, asked, built_by, index.dimension, options)}
    checked = "" if built_by.get("weights_sha256") else " (given by who pushed the index, not checked)"
    pinned = ("model", f"[{name}](https://huggingface.co/{name}) at `{built_by['revision']}`{checked}")
    shown = [("passages", f"{len(index):,}"), *(pinned if row is _MODEL else row for row in rows)]
    what = (
        f"{what} of {len(index):,} passages, encoded by [{name}](https://huggingface.co/{name}); scores "
        "are inner products."
    )
    before, index.built_by = index.built_by, built_by
    try:
        return _push(index, kind, repo_id, shown, what, settings_file, **options)
    finally:
        index.built_by = before


def _pinned(
    name: str, revision: str | None, built_by: Mapping[str, Any], dimension: int, options: Mapping[str, Any]
) -> str:
    """The commit of the model, whose weights are those that built the index."""
    from huggingface_hub import HfApi

    from tct_hf.retrieval.built_by import check_model
    from tct_hf.retrieval.encode import describe_model

    token = options.get("token")
    wanted = built_by.get("weights_sha256")
    if not wanted and revision is None:
        raise ValueError(
            "model_revision: the index does not record which weights built it (built_by has no weights_sha256), so "
            f"that no revision of {name} can be checked: name the commit that built it (the card will say that it is "
            "given, not checked), or build the index again with built_by= of this model."
        )
    with hub_errors(name, "looking up the index's model"):
        commit = str(HfApi(token=token).model_info(name, revision=revision).sha)
    if wanted:
        model = _encoder(name, built_by, dimension, revision=commit, token=token, device="cpu")
        found = describe_model(model)["model"]
        if found["weights_sha256"] != wanted:
            raise ValueError(
                f"model_revision: {name} at {commit[:12]} has the weights {found['weights_sha256'][:12]}, but the "
                f"index was built by {wanted[:12]}: name the revision that built it, or push that model first."
            )
        check_model(f"model_revision {commit[:12]}: the index", built_by, found)
    return commit


def push_sparse(index: BM25Index, repo_id: str, **options: Any) -> PushedIndex:
    """Push a BM25 index; see `BM25Index.push_to_hub`."""
    settings = {name: value for name, value in index.settings.items() if name != "expansion"}
    rows = [("passages", f"{len(index):,}"), *((name, str(value)) for name, value in settings.items())]
    what = f"A BM25 index (bm25s) of {len(index):,} passages."
    if expansion := index.settings.get("expansion"):
        what = f"A BM25 index (bm25s) of {len(index):,} passages, each with queries that were generated for it."
        rows += [(f"expansion: {name}", str(value)) for name, value in expansion.items() if value not in (None, False)]
    return _push(index, "BM25Index", repo_id, rows, what, "tct_bm25.json", **options)


def _check_asked(repo_id: str, license: str | None) -> None:
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id: {repo_id!r} is no Hub id; write owner/name.")
    if not license:
        raise ValueError('license: an index on the Hub needs one, such as license="cc-by-4.0"; that of its passages.')


def _push(
    index: Any,
    kind: str,
    repo_id: str,
    rows: Sequence[tuple[str, str]],
    what: str,
    settings_file: str,
    *,
    license: str | None = None,
    license_note: str | None = None,
    passages: str | None = None,
    private: bool | None = None,
    revision: str = "main",
    tag: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> PushedIndex:
    from huggingface_hub import DatasetCard, DatasetCardData

    _check_asked(repo_id, license)
    pin = f', revision="{tag}"' if tag else ""
    usage = [f"from tct_hf import {kind}", "", f'index = {kind}.from_hub("{repo_id}"{pin})']
    if kind != "BM25Index":
        usage += [
            "model = index.load_model()  # the revision that built it",
            'ids, scores = index.search(model.encode_query(["a question"]), k=10)',
        ]
    else:
        usage += ['ids, scores = index.search(["a question"], k=10)']
    data = DatasetCardData(license=license, tags=["retrieval", "index", *_TAGS[kind]])
    card = DatasetCard.from_template(
        data,
        template_str=template("index"),
        title=repo_id.split("/")[1],
        what=what,
        usage="\n".join(usage),
        passages=passages,
        rows=rows,
        settings_file=settings_file,
        licence_note=license_note,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "index"
        index.save(folder)
        write_text_atomic(folder / "README.md", str(card))
        sent, commit, url = push_folder(
            folder,
            repo_id,
            kind="dataset",
            private=private,
            revision=revision,
            tag=tag,
            token=token,
            message=message or f"Index of {len(index):,} passages",
            replaced=lambda name: _REPLACED.fullmatch(name) is not None,
        )
    return PushedIndex(repo_id, url, commit, tag, sent)


def fetch_index(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download an index into the client's cache.

    Args:
        repo_id: a dataset repository of `push_to_hub`.
        revision: branch, tag or commit.
        token: of the Hub; the one logged in with when None.

    Returns:
        The folder.

    Raises:
        HubError: the repository can't be had.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(repo_id, "downloading the index"):
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token))


def load_model_of(index: Any, *, token: str | None = None, device: str | None = None) -> Any:
    """The model that built an index, at the revision that built it; see `DenseIndex.load_model`."""
    from tct_hf.retrieval.built_by import check_model
    from tct_hf.retrieval.encode import describe_model

    built_by = index.built_by or {}
    if not built_by.get("id"):
        raise ValueError("load_model: this index does not say which model built it; build it again with built_by=.")
    revision = built_by.get("revision")
    model = _encoder(built_by["id"], built_by, index.dimension, revision=revision, token=token, device=device)
    check_model("this index", built_by, describe_model(model, built_by["id"])["model"])
    return model


def _encoder(name: str, built_by: Mapping[str, Any], dimension: int, **options: Any) -> Any:
    """A model, cut to the first dimensions where an index is of those, as of a Matryoshka student."""
    from tct_hf.encoding.convert import load_encoder

    model = load_encoder(name, **options)
    # Only where the index says what it was cut to, which is compared after this: other ways make small vectors too.
    if "truncate_dim" in (built_by.get("encoding") or {}) and dimension < (model.get_embedding_dimension() or 0):
        model.truncate_dim = dimension
    return model
