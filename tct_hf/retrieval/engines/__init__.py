"""Engines that other people run, filled with what encode has written."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tct_hf.retrieval.engines.base import EngineIndex


def engine_of(url: str | None) -> type[EngineIndex]:
    """The engine behind a URL: Milvus for http://, https://, unix: and a file .db, otherwise PostgreSQL."""
    if url and (url.startswith(("http://", "https://", "unix:")) or url.endswith(".db")):
        from tct_hf.retrieval.engines.milvus import MilvusIndex

        return MilvusIndex
    from tct_hf.retrieval.engines.postgres import PgVectorIndex

    return PgVectorIndex
