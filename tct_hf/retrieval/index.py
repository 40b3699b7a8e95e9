"""What all indexes share: a folder of checked files, the way to the Hub and back, and the model behind the vectors."""

from __future__ import annotations

import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from huggingface_hub import DatasetCard, DatasetCardData, HfApi, snapshot_download

from tct_hf.files import (
    check_seal,
    read_json,
    replace_dir,
    seal,
    staging_beside,
    write_json_atomic,
    write_text_atomic,
)
from tct_hf.hub_client import check_hub_names, check_metadata, hub_errors, push_folder, template
from tct_hf.retrieval.checks import check_k, check_model, described
from tct_hf.retrieval.runs import Run

if TYPE_CHECKING:
    from typing_extensions import Self

_IDS_FILE = "ids.arrow"
_AGAIN = "delete the folder, then build and save the index again"
# Files of an earlier index in a repository, which go when the new one lacks them.
_REPLACED = re.compile(r".*\.(faiss|npy|npz|json|bin|arrow)")


@dataclass(frozen=True)
class PushedIndex:
    """Where an index was pushed: dataset repository, its URL, the commit and its tag, and the files that were new."""

    repo_id: str
    url: str
    commit: str
    tag: str | None
    sent: list[str]


class Index(ABC):
    """Passages that can be searched, by id."""

    ids: Any
    kind: ClassVar[str]  # in messages
    title: ClassVar[str]  # on the card
    tags: ClassVar[Sequence[str]]
    settings_file: ClassVar[str]
    format: ClassVar[int]
    hub_options: ClassVar[str] = ""  # that the card's call of `from_hub` has
    usage: ClassVar[Sequence[str]] = ('ids, scores = index.search(["a question"], k=10)',)

    def __len__(self) -> int:
        return len(self.ids)

    # An index says what its settings file holds besides format and passages; writes its files, but for ids and
    # settings; reads them, with a ValueError where they don't fit; and says for the card what its passages are, with
    # rows of a table.
    @abstractmethod
    def _settings(self) -> dict[str, Any]: ...

    @abstractmethod
    def _write(self, folder: Path) -> None: ...

    @classmethod
    @abstractmethod
    def _open(cls, folder: Path, settings: dict[str, Any], ids: Any, *, mmap: bool, verify: bool) -> Self: ...

    @abstractmethod
    def _card(self) -> tuple[str, list[tuple[str, str]]]: ...

    def save(self, directory: str | Path) -> None:
        """Write the index to a folder; an index of this kind that is there is replaced whole, all else refused."""
        folder = Path(directory).resolve()  # a link to an index on another disk is followed
        if folder.exists() and not (folder / self.settings_file).is_file() and any(folder.iterdir()):
            raise FileExistsError(f"{folder}: holds something other than a {self.kind}; name another folder")
        with staging_beside(folder) as staging:
            staging.mkdir()
            self._write(staging)
            table = pa.table({"id": self.ids if isinstance(self.ids, pa.Array) else id_array(self.ids)})
            with pa.ipc.new_file(str(staging / _IDS_FILE), table.schema) as writer:
                writer.write_table(table)
            write_json_atomic(staging / self.settings_file, {"format": self.format, **self._settings()})
            seal(staging)
            for path in staging.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            replace_dir(staging, folder)

    @classmethod
    def load(cls, directory: str | Path, *, mmap: bool = False, verify: bool = True) -> Self:
        """Open an index that `save` wrote."""
        folder = Path(directory)
        file = folder / cls.settings_file
        if not file.is_file():
            raise FileNotFoundError(f"{folder}: no {cls.kind} here ({file.name} is missing); build and save one first")
        settings = read_json(file, _AGAIN)
        if (found := settings.pop("format", None)) != cls.format:
            raise ValueError(f"{file}: format {found} where this version reads {cls.format}; {_AGAIN}")
        try:
            check_seal(folder, verify=verify)
            with pa.memory_map(str(folder / _IDS_FILE)) if mmap else pa.OSFile(str(folder / _IDS_FILE)) as source:
                table = pa.ipc.open_file(source).read_all()
            table.validate(full=verify)
            return cls._open(folder, settings, table["id"].chunk(0), mmap=mmap, verify=verify)
        except (RuntimeError, OSError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: damaged {cls.kind} ({error}); copy it again, or {_AGAIN}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str,
        license_note: str | None = None,
        passages: str | None = None,
        private: bool | None = None,
        revision: str = "main",
        tag: str | None = None,
        token: str | None = None,
        **model: Any,
    ) -> PushedIndex:
        """Push the index to a dataset repository: files and a card.

        Args:
            repo_id: dataset repository.
            license: of the passages.
            license_note: a sentence about it on the card.
            passages: where the passages are, for the card.
            private: whether the repository is to be private.
            revision: branch.
            tag: of the commit.
            token: of the Hub.
            **model: `model_id` and `model_revision`, of an index of vectors: the model that built it, by default its
                newest revision. It is loaded first: its weights must be those that built the index.
        """
        check_hub_names(repo_id, revision, tag)
        if not license:
            raise ValueError('license: an index on the Hub needs that of its passages, such as license="cc-by-4.0".')
        check_metadata({"license": license})
        index = self._pinned(token=token, **model)
        pin = (f', revision="{tag}"' if tag else "") + self.hub_options
        name = type(self).__name__
        usage = [f"from tct_hf import {name}", "", f'index = {name}.from_hub("{repo_id}"{pin})', *self.usage]
        of_what, rows = index._card()
        card = DatasetCard.from_template(
            DatasetCardData(license=license, tags=["retrieval", "index", *self.tags]),
            template_str=template("index"),
            title=repo_id.split("/")[1],
            what=f"{self.title} of {len(self):,} passages{of_what}.",
            usage="\n".join(usage),
            passages=passages,
            rows=[("passages", f"{len(self):,}"), *rows],
            settings_file=self.settings_file,
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
                message=f"Index of {len(self):,} passages",
                replaced=lambda name: _REPLACED.fullmatch(name) is not None,
            )
        return PushedIndex(repo_id, url, commit, tag, sent)

    def _pinned(self, *, token: str | None) -> Self:
        """The index as it is pushed."""
        return self

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | None = None, **options: Any) -> Self:
        """Download and open an index that `push_to_hub` pushed."""
        with hub_errors(repo_id, "downloading the index"):
            folder = snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token)
        return cls.load(folder, **options)


class VectorSearch(ABC):
    """Passages that are found by their vectors."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def dimension(self) -> int:
        """Components of a vector."""

    def search(self, query_vectors: Any, k: int = 100) -> tuple[list[list[str]], list[np.ndarray]]:
        """Find the passages with the greatest inner product.

        Args:
            query_vectors: (queries, dimension); of a sparse index scipy's or torch's sparse ones, or one vector of
                torch.
            k: passages a query, at most; a sparse index never returns passages without any term of the query.

        Returns:
            Ids and float32 scores, one list and one array a query, best first.

        Raises:
            ValueError: k is below 1, a wrong shape, a component that is NaN, infinite or, if sparse, negative, or a
                score that float32 can't hold.
        """
        k, queries = check_k(k), self._rows_of(query_vectors, "query_vectors")
        if not queries.shape[0]:
            return [], []
        if queries.shape[1] != self.dimension:
            raise ValueError(
                f"query_vectors: dimension {queries.shape[1]} where the index has {self.dimension}; encode queries "
                "with the model that encoded the passages"
            )
        return self._search(queries, self._at_most(k))

    def _at_most(self, k: int) -> int:
        return min(k, len(self))

    # An index says how query vectors are read, and searched: rows of its own dimension, one or more.
    _rows_of: ClassVar[Any]

    @abstractmethod
    def _search(self, queries: Any, k: int) -> tuple[list[list[str]], list[np.ndarray]]: ...

    def run(self, query_ids: Sequence[str], query_vectors: Any, k: int = 100) -> Run:
        """Search and return a run."""
        ids, scores = self.search(query_vectors, k)
        names = list(query_ids)
        if isinstance(query_ids, str) or len(names) != len(ids) or len(set(names)) != len(names):
            raise ValueError(
                f"query_ids: {len(names)} ids, {len(set(names))} of them distinct, for {len(ids)} vectors; pass one "
                "id for each, each once"
            )
        return as_run(names, ids, scores)


class VectorIndex(Index, VectorSearch):
    """An index of vectors, with a record of the model that encoded the passages."""

    built_by: dict[str, Any] | None
    usage = (
        "model = index.load_model()  # the revision that built it",
        'ids, scores = index.search(model.encode_query(["a question"]), k=10)',
    )

    def _names(self, rows: Any) -> list[str]:
        """The ids of some rows, an integer array."""
        names: list[str] = self.ids.take(pa.array(rows)).to_pylist()
        return names

    @classmethod
    def load(cls, directory: str | Path, *, model: Any = None, **options: Any) -> Self:
        """Open an index that `save` wrote, and refuse it where `model` did not build it."""
        index = super().load(directory, **options)
        if model is not None:
            check_model(directory, index.built_by, model if isinstance(model, Mapping) else described(model))
        return index

    def _pinned(self, *, token: str | None, model_id: str | None = None, model_revision: str | None = None) -> Self:
        built_by = self.built_by or {}
        name = model_id or built_by.get("id") or ""
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).exists():
            raise ValueError(
                f"model_id: {name or None!r} is no Hub id, but whoever loads the index must encode queries with the "
                "model that built it: push that model first (tct_hf.release), then pass model_id=."
            )
        if not built_by.get("weights_sha256"):
            raise ValueError(
                f"built_by: the index does not record which weights built it, so that no revision of {name} can be "
                'checked; build it again with built_by=, "model" in the manifest of encode_corpus.'
            )
        with hub_errors(name, "looking up the index's model"):
            revision = model_revision or built_by.get("revision")
            commit = str(HfApi(token=token).model_info(name, revision=revision).sha)
        found = described(self._encoder(name, revision=commit, token=token, device="cpu"))
        check_model(f"model_revision {commit[:12]}: the index", built_by, found)
        pinned = copy(self)
        pinned.built_by = {**built_by, "id": name, "revision": commit}
        return pinned

    def _card(self) -> tuple[str, list[tuple[str, str]]]:
        built_by = self.built_by or {}
        link = f"[{built_by['id']}](https://huggingface.co/{built_by['id']})"
        rows = [("dimension", f"{self.dimension:,}"), *self._facts(), ("model", f"{link} at `{built_by['revision']}`")]
        return f", encoded by {link}; scores are inner products", rows

    @abstractmethod
    def _facts(self) -> list[tuple[str, str]]:
        """Rows of the card's table."""

    def load_model(self, *, token: str | None = None, device: str | None = None) -> Any:
        """Load the model that built the index, at the revision that built it, to encode queries with."""
        built_by = self.built_by or {}
        if not built_by.get("id"):
            raise ValueError("load_model: the index does not say which model built it; build it again with built_by=.")
        model = self._encoder(built_by["id"], revision=built_by.get("revision"), token=token, device=device)
        check_model("this index", built_by, described(model))
        return model

    def _encoder(self, name: str, **options: Any) -> Any:
        from tct_hf.encoding.convert import load_encoder  # torch: an index can be searched without

        model = load_encoder(name, **options)
        # Only where the index says what it was cut to, which is compared after this: small vectors have other causes.
        cut = "truncate_dim" in ((self.built_by or {}).get("encoding") or {})
        if cut and self.dimension < (model.get_embedding_dimension() or 0):
            model.truncate_dim = self.dimension
        return model


def best_first(names: Sequence[str], scores: np.ndarray, k: int) -> tuple[list[str], np.ndarray]:
    """The best `k` of a query's passages, equal scores by id."""
    order = sorted(range(len(names)), key=lambda at: (-scores[at], names[at]))[:k]
    return [names[at] for at in order], scores[order]


def as_run(names: Iterable[str], ids: Iterable[Sequence[str]], scores: Iterable[np.ndarray]) -> Run:
    """What a search of some queries found, as a run."""
    found = zip(names, ids, scores, strict=True)
    return {name: dict(zip(hits, values.tolist(), strict=True)) for name, hits, values in found}


def id_array(ids: Iterable[str]) -> Any:
    """Ids as an Arrow array, whose offsets have 8 bytes only where 4 are too few."""
    array = pa.array(ids, pa.string())
    return array if isinstance(array, pa.Array) else array.cast(pa.large_string()).combine_chunks()
