"""A folder of expansions: shards of generated queries in the corpus's order, and the manifest that says what they are.

tct_settings.json   what they are made with; written first
00000.parquet       columns `id` and `queries` of a shard of passages, with a checksum of these passages
manifest.json       written last: all of tct_settings.json, and each shard's file by count and checksum
scores/             the same again where a teacher has scored them: columns `id` and `scores`, one a query
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tct_hf.files import CLAIM_FILE, file_digest, write_aside, write_json_atomic

MANIFEST_FILE = "manifest.json"
SCORES_FOLDER = "scores"
_RECORD = b"tct_hf"
_BEGIN_AGAIN = "choose another folder, or delete this one to begin again."


def shard_file(folder: Path, number: int) -> Path:
    """Where a shard is, written or not."""
    return folder / f"{number:05d}.parquet"


def passages_digest(passages: Sequence[tuple[str, str]]) -> str:
    """A checksum of ids and texts."""
    digest = hashlib.sha256()
    for passage_id, text in passages:
        for part in (passage_id, text):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(b"%d " % len(data) + data)
    return digest.hexdigest()


def write_shard(
    folder: Path, number: int, ids: Sequence[str], column: str, values: Sequence[Sequence[Any]], made_of: str
) -> None:
    """Write a shard aside, and rename it.

    Args:
        folder: of the expansions, or of their scores.
        number: of the shard.
        ids: of its passages.
        column: "queries" or "scores".
        values: a list a passage.
        made_of: checksum of what they were made of.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    record = json.dumps({"made_of": made_of, "count": len(ids)})
    schema = pa.schema([("id", pa.string()), (column, pa.list_(_ITEMS[column]()))], metadata={_RECORD: record})
    table = pa.table([pa.array(ids, pa.string()), pa.array(values, schema.field(column).type)], schema=schema)
    with write_aside(shard_file(folder, number)) as aside:
        pq.write_table(table, aside, compression="zstd")


def _string() -> Any:
    import pyarrow as pa

    return pa.string()


def _float32() -> Any:
    import pyarrow as pa

    return pa.float32()


_ITEMS = {"queries": _string, "scores": _float32}


def read_shard(folder: Path, number: int, column: str) -> Any:
    """A shard as a table of the columns id and `column`.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged; names the file and the mend.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = shard_file(folder, number)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: run again what wrote the folder, and it makes this shard anew")
    try:
        table = pq.read_table(file, columns=["id", column])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{file}: damaged ({error}): delete it, and run again what wrote the folder") from error
    if table.num_columns != 2:
        raise ValueError(f"{file}: it has no column {column!r}: delete it, and run again what wrote the folder")
    return table.replace_schema_metadata(None)


def is_made_of(folder: Path, number: int, made_of: str) -> bool:
    """Whether a shard is there already.

    Args:
        folder: of the expansions, or of their scores.
        number: of the shard.
        made_of: checksum of what it should be made of.

    Raises:
        ValueError: it is there, but was made of something else, or is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = shard_file(folder, number)
    if not file.is_file():
        return False
    try:
        record = json.loads((pq.read_schema(file).metadata or {})[_RECORD])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: damaged ({error}): delete it, and run again what wrote the folder") from error
    if record["made_of"] != made_of:
        raise ValueError(f"{file} was made of other passages (a text, an id or their order differs): {_BEGIN_AGAIN}")
    return True


def finish(folder: Path, shards: int, count: int, *, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write the manifest once every shard is there, and return it.

    Args:
        folder: of the expansions, or of their scores.
        shards: how many there are.
        count: passages in all.
        about: to be said beside the settings, which it does not take part in.

    Raises:
        ValueError: there are more shards than the corpus has.
        FileNotFoundError: a shard is missing.
    """
    import pyarrow.parquet as pq

    if shard_file(folder, shards).is_file():
        raise ValueError(
            f"{shard_file(folder, shards)} was made of another corpus (this one has {count:,} passages and ends "
            f"before it): {_BEGIN_AGAIN}"
        )
    entries = []
    for number in range(shards):
        file = shard_file(folder, number)
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: run again, and it is made anew")
        rows = pq.read_metadata(file).num_rows
        entries.append({"file": file.name, "count": rows, "sha256": file_digest(file)})
    settings = json.loads((folder / CLAIM_FILE).read_text(encoding="utf-8"))
    manifest = {**settings, **(about or {}), "count": count, "shards": entries}
    write_json_atomic(folder / MANIFEST_FILE, manifest)
    return manifest


def read_manifest(folder: Path, what: str) -> dict[str, Any]:
    """The manifest of a finished folder.

    Args:
        folder: of the expansions, or of their scores.
        what: it should hold, for messages.

    Raises:
        FileNotFoundError: there is none, or what it announces is not finished.
        ValueError: it is damaged.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        if (folder / CLAIM_FILE).is_file():
            raise FileNotFoundError(f"{folder}: its {what} are not finished; run again what made them, and it goes on")
        raise FileNotFoundError(
            f"{folder}: no {what} here ({MANIFEST_FILE} is missing); give the folder that has them"
        )
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if missing := [key for key in ("count", "shards") if key not in manifest]:
            raise ValueError(f"{', '.join(missing)} is missing")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error}): delete it, and run again what wrote the folder") from error
    return manifest


def checked_shards(folder: Path, manifest: Mapping[str, Any], column: str) -> Iterator[Any]:
    """The tables of all shards in order, each compared with what the manifest announces.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a shard is damaged or was altered.
    """
    for number, entry in enumerate(manifest["shards"]):
        file = shard_file(folder, number)
        if file.is_file() and file_digest(file) != entry["sha256"]:
            raise ValueError(
                f"{file} is damaged or was altered (its checksum differs): delete it, and run again what wrote the "
                "folder"
            )
        yield read_shard(folder, number, column)
