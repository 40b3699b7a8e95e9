"""Indexes that belong to a model: to the Hub and back, pinned to the revision that encoded the passages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder
    from typing_extensions import Self

    from tct_hf.retrieval.hub_indexes import PushedIndex


class PinnedIndex(ABC):
    """What an index of dense and one of sparse vectors have in common.

    Attributes:
        built_by: {"id", "weights_sha256", "encoding"} of the model that encoded the passages, where it was given; from
            the Hub also "revision".
    """

    built_by: dict[str, Any] | None

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def dimension(self) -> int:
        """Of a vector."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write the index to a folder."""

    @classmethod
    @abstractmethod
    def load(cls, directory: str | Path, *, mmap: bool = False, verify: bool = True, model: Any | None = None) -> Self:
        """Open an index that `save` wrote."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str,
        model_id: str | None = None,
        model_revision: str | None = None,
        license_note: str | None = None,
        passages: str | None = None,
        private: bool | None = None,
        revision: str = "main",
        tag: str | None = None,
        token: str | None = None,
    ) -> PushedIndex:
        """Push the index to a dataset repository: files, manifest and a card that pins the model's revision.

        The model at that revision is loaded first and its weights are compared with those that built the index. Where
        the index does not record these, a revision has to be named, and the card says that it was not checked.

        Args:
            repo_id: owner/name; made when missing.
            model_id: Hub id of the model that built the index; by default as `built_by` names it.
            model_revision: its branch, tag or commit; by default as `built_by` names it, or its main branch.
            license: identifier of the Hub's list; that of the passages.
            license_note: what a reader must know of it.
            passages: where the texts are, for the card, such as the Hub id of a data set.
            private: of a repository that is made; None: the account's setting. True of a public one is refused.
            revision: branch to push to; made when missing.
            tag: name for the commit; a tag never moves.
            token: of the Hub; the one logged in with when None.

        Returns:
            Repository, URL, commit and what was sent.

        Raises:
            ValueError: no Hub id of the model, another model's weights, or no revision where the index records no
                weights; no licence; a tag that is taken; a public repository where a private one is asked for.
            HubError: the Hub refused or could not be reached.
        """
        from tct_hf.retrieval.hub_indexes import push_pinned

        return push_pinned(
            self,
            repo_id,
            model_id=model_id,
            model_revision=model_revision,
            license=license,
            license_note=license_note,
            passages=passages,
            private=private,
            revision=revision,
            tag=tag,
            token=token,
        )

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        mmap: bool = False,
        verify: bool = True,
        model: SentenceTransformer | SparseEncoder | Mapping[str, Any] | None = None,
    ) -> Self:
        """Download and open an index that `push_to_hub` pushed.

        Args:
            repo_id: the dataset repository.
            revision: branch, tag or commit.
            token: of the Hub; the one logged in with when None.
            mmap: as in `load`.
            verify: as in `load`.
            model: as in `load`.

        Returns:
            The index; `load_model` gives the model to encode queries with.

        Raises:
            HubError: the repository can't be had.
            ValueError: as `load`.
            FileNotFoundError: the repository holds no index of this kind.
        """
        from tct_hf.retrieval.hub_indexes import fetch_index

        return cls.load(fetch_index(repo_id, revision=revision, token=token), mmap=mmap, verify=verify, model=model)

    def load_model(self, *, token: str | None = None, device: str | None = None) -> Any:
        """Load the model that built the index, at the revision that built it, to encode queries with.

        An index of a student's first dimensions gets the student cut to them.

        Args:
            token: of the Hub; the one logged in with when None.
            device: to load to; sentence-transformers' choice when None.

        Returns:
            A SentenceTransformer, or of a sparse index a SparseEncoder.

        Raises:
            ValueError: the index names no model, or its weights are others now.
            HubError: the model can't be had.
        """
        from tct_hf.retrieval.hub_indexes import load_model_of

        return load_model_of(self, token=token, device=device)
