"""Push the vectors of recipes/encode.py into PostgreSQL with pgvector, or into Milvus, to search them there.

python recipes/push.py --vectors outputs/encode --name passages [--url postgresql://host/db] [--source PATH]

Without --url it is PostgreSQL, and the environment says where (PGHOST, PGDATABASE, PGUSER, PGPASSWORD or a .pgpass
file). Milvus is --url http://host:19530, with its token or user:password in MILVUS_TOKEN. With --source the passages'
texts are stored beside their vectors. If it is stopped, the same command resumes after the last whole shard;
called again, it stores nothing twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from tct_hf.pipeline import one_row
from tct_hf.settings import run_recipe, setting


@dataclass
class Settings:
    vectors: str = setting("outputs/encode", "folder of recipes/encode.py")
    url: str | None = setting(None, "of the server; that of its environment variables when null")
    name: str = setting("passages", "table to fill, made where it is missing")
    half: bool = setting(False, "store vectors in half precision")
    m: int = setting(16, "neighbours of a passage in the graph")
    ef_construction: int = setting(64, "candidates looked at for each when the graph is built")
    source: str | None = setting(None, "collection that was encoded, to store its texts and metadata too")
    packages: list[str] = setting(["numpy", "scipy", "pandas", "sklearn"], "packages of the built-in corpus")
    verify: bool = setting(True, "read a sample back and measure recall when all is stored")


def main(settings: Settings) -> None:
    from tct_hf.data.collection import read_corpus
    from tct_hf.retrieval.engines import engine_of

    corpus = None if settings.source is None else read_corpus(settings.source, settings.packages)
    graph = {"m": settings.m, "ef_construction": settings.ef_construction}
    options = {"corpus": corpus, "half": settings.half, **graph}
    index = engine_of(settings.url).push(settings.vectors, settings.url, settings.name, **options)
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
