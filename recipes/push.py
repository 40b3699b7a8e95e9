"""Push the vectors of recipes/encode.py into PostgreSQL with pgvector, or into Milvus, to search them there.

python recipes/push.py --vectors outputs/encode --name passages [--url postgresql://host/db] [--source PATH]

Without --url it is PostgreSQL, and the environment says where (PGHOST, PGDATABASE, PGUSER, PGPASSWORD or a .pgpass
file). Milvus is --url http://host:19530, with its token or user:password in MILVUS_TOKEN. With --source the passages'
texts are stored beside their vectors. If it is stopped, the same command resumes after the last whole shard;
called again, it stores nothing twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tct_hf.pipeline import one_row
from tct_hf.settings import run_recipe, setting


@dataclass
class Settings:
    vectors: str = setting("outputs/encode", "folder of recipes/encode.py")
    url: str | None = setting(None, "of the server; that of its environment variables when null")
    name: str = setting("passages", "table to fill, made where it is missing")
    half: bool = setting(False, "store vectors in half precision")
    m: int | None = setting(None, "neighbours of a passage in the graph of a new table; 16 when null")
    ef_construction: int | None = setting(
        None, "candidates looked at for each when a new table's graph is built; 64 when null"
    )
    index: Literal["HNSW", "AUTOINDEX", "FLAT"] | None = setting(
        None, "of a new table in Milvus: HNSW when null; FLAT is exact"
    )
    source: str | None = setting(None, "collection that was encoded, to store its texts and metadata too")
    packages: list[str] = setting(["numpy", "scipy", "pandas", "sklearn"], "packages of the built-in corpus")
    allow_empty: bool = setting(False, "as it was encoded")
    skip_bad_rows: bool = setting(False, "as it was encoded")
    verify: bool = setting(True, "read a sample back and measure recall when all is stored")


def main(settings: Settings) -> None:
    from tct_hf.data.collection import read_corpus
    from tct_hf.retrieval.engines import engine_of

    corpus = None
    if settings.source is not None:
        how = {"allow_empty": settings.allow_empty, "skip_bad_rows": settings.skip_bad_rows}
        corpus = read_corpus(settings.source, settings.packages, **how)
    graph = {name: getattr(settings, name) for name in ("m", "ef_construction", "index")}
    options = {name: value for name, value in graph.items() if value is not None}
    table = settings.vectors, settings.url, settings.name
    index = engine_of(settings.url).push(*table, corpus=corpus, half=settings.half, **options)
    if settings.verify:
        found = index.verify(settings.vectors)
        cells = {
            "passages": f"{found['passages']:,} of {found['expected']:,}",
            "read back equal": f"{found['equal']} of {found['sample']}",
            f"recall at {found['k']}": f"{found['recall']:.3f}",
            "through the graph": "yes" if found["uses_graph"] else "no",
        }
        print("\n" + one_row(cells))


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
