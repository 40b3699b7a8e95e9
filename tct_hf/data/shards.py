"""A folder of numbered Arrow files (shards), claimed first, listed last in a manifest: work that survives a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa  # type: ignore[import-untyped]
import xxhash

from tct_hf.files import (
    CLAIM_FILE,
    claim,
    file_digest,
    read_claim,
    read_json,
    working_in,
    write_aside,
    write_json_atomic,
)

if TYPE_CHECKING:
    from accelerate import PartialState

    from tct_hf.progress import PassageProgress

MANIFEST_FILE = "manifest.json"
# Raise it when files of the same settings change.
FORMAT = 3
_MADE_OF = b"tct_hf"
_CHECKSUM = "checksum"  # of the rest of the manifest
# Of a folder that several jobs fill: "jobs", "shards" and "items"; gone when it is finished.
_JOBS_FILE = ".jobs.json"
_BEGIN_AGAIN = "choose another folder, or delete this one to begin again."
_RUN_AGAIN = "delete it, and run again what wrote the folder"


def run_shards(
    folder: str | Path,
    settings: Mapping[str, Any],
    parts: Iterable[tuple[str, Sequence[Any]]],
    make: Callable[[Sequence[Any]], Any],
    *,
    about: Mapping[str, Any] | Callable[[Sequence[Any]], Mapping[str, Any]] | None = None,
    names: Mapping[str, str | None] | None = None,
    state: PartialState | None = None,
    progress: PassageProgress | None = None,
) -> dict[str, Any]:
    """Write a shard of each part that has none yet, then the manifest; called again after a kill, it goes on.

    Args:
        folder: made when missing.
        settings: JSON-ready, all that the shards depend on besides the parts.
        parts: a checksum of what a shard is made of, and its items; the same parts in every process.
        make: items to columns, name to Arrow array, or to an Arrow table with metadata of its own.
        about: JSON-ready, said in the manifest besides the settings; or what makes that of the tables of all shards.
        names: as in `claim`.
        state: the processes of a distributed run, which share the missing shards; one process when None.
        progress: told of items whose shard is there already.
    """
    folder = Path(folder)
    if settings.get("shard_size", 1) < 1:
        raise ValueError(f"shard_size must be at least 1, got {settings['shard_size']}.")
    wait = state.wait_for_everyone if state is not None else lambda: None
    rank, processes = (state.process_index, state.num_processes) if state is not None else (0, 1)
    with working_in(folder, rank == 0):
        if rank == 0:
            _claim(folder, settings, names)
        wait()
        there = _there(folder)
        wait()  # a shard is written only after every process has seen which are there
        shards = count = missing = 0
        for shards, (made_of, items) in enumerate(parts, 1):
            file = shard_file(folder, shards - 1)
            if file.name in there:
                _compare(file, made_of)
                if progress is not None:
                    progress.skipped(len(items))
            else:
                if missing % processes == rank:
                    _write_shard(file, make(items), made_of)
                missing += 1
            count += len(items)
        if not shards:
            raise ValueError(f"{folder}: nothing to write, the corpus or the rows are empty.")
        wait()
        if rank == 0:
            _finish(folder, shards, count, about or {}, there)
        wait()
    return read_manifest(folder, "shards")


def run_job(
    folder: str | Path,
    settings: Callable[[], Mapping[str, Any]],
    parts: Iterable[tuple[str | None, Sequence[Any]]],
    make: Callable[[Sequence[Any]], Any],
    *,
    jobs: int,
    size: tuple[int, int] | None = None,
    about: Mapping[str, Any] | Callable[[Sequence[Any]], Mapping[str, Any]] | None = None,
    names: Mapping[str, str | None] | None = None,
    progress: PassageProgress | None = None,
) -> dict[str, Any]:
    """Write one job's shards of a folder that several fill, none waiting for another; called again, it goes on.

    The job that finds all shards there writes the manifest. The folder is locked only while it is claimed, and while
    the manifest is written.

    Args:
        folder: as in `run_shards`, as are make, about, names and progress.
        settings: makes the settings, in turn: a job can take over what an earlier one has claimed.
        parts: as in `run_shards`; of a shard of another job no checksum, and as many items of any kind.
        jobs: how many there are.
        size: shards and items in all; None where they are known when all are read.

    Returns:
        The manifest; empty while shards of other jobs are missing.
    """
    folder = Path(folder)
    with working_in(folder, shared=True):
        _claim(folder, settings(), names, shared=True)
        if size is not None and not (folder / MANIFEST_FILE).is_file():
            _note_jobs(folder, jobs, *size)
    written: set[str] = set()
    shards = count = 0
    for shards, (made_of, items) in enumerate(parts, 1):
        file = shard_file(folder, shards - 1)
        count += len(items)
        if made_of is None:
            continue
        if not file.is_file():
            _write_shard(file, make(items), made_of, held=False)
            written.add(file.name)
            continue
        _compare(file, made_of)
        if progress is not None:
            progress.skipped(len(items))
    with working_in(folder, shared=True):
        there = _there(folder)
        if any(shard_file(folder, number).name not in there for number in range(shards)):
            _note_jobs(folder, jobs, shards, count)
            return {}
        announced = _announced(folder)
        changed = any(announced.get(name) != file_digest(folder / name) for name in written)
        if changed or len(announced) != shards:  # otherwise another job has just written it
            _finish(folder, shards, count, about or {}, there - written)
    return read_manifest(folder, "shards")


def _claim(folder: Path, settings: Mapping[str, Any], names: Any, shared: bool = False) -> None:
    if not (folder / CLAIM_FILE).is_file() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise FileExistsError(f"{folder}: holds something other than shards; name another folder")
    claim(folder, {**settings, "format": FORMAT}, names, shared=shared)


def _note_jobs(folder: Path, jobs: int, shards: int, items: int) -> None:
    """Write down what all jobs are to make, or refuse a job that has other things to make it of."""
    file, noted = folder / _JOBS_FILE, {"jobs": jobs, "shards": shards, "items": items}
    before = read_json(file, "delete it.", needs=list(noted)) if file.is_file() else noted
    if before["items"] != items:
        both = f"another job was given {before['items']:,} passages, this one {items:,}"
        raise ValueError(f"{folder}: {both}; give all jobs the same corpus, or {_BEGIN_AGAIN}")
    write_json_atomic(file, noted)


def _missing(folder: Path, what: str) -> str:
    """What is missing of a folder that is not finished, and what to run again."""
    if not (folder / _JOBS_FILE).is_file():
        return f"its {what} are not finished; run again what made them, and it goes on"
    noted, there = read_json(folder / _JOBS_FILE, "delete it.", needs=["jobs", "shards"]), _there(folder)
    missing = [number for number in range(noted["shards"]) if shard_file(folder, number).name not in there]
    if not missing:
        return f"all shards of its {what} are there, but not {MANIFEST_FILE}; run any of its jobs again to write that"
    some = ", ".join(shard_file(folder, number).name for number in missing[:5]) + ", ..." * (len(missing) > 5)
    jobs = ", ".join(map(str, sorted({number % noted["jobs"] for number in missing})))
    left = f"{len(missing):,} of {noted['shards']:,} shards of its {what} are missing ({some})"
    return f"{left}; if they no longer run, start these of its {noted['jobs']} jobs again (from 0): {jobs}"


def has_shards(folder: Path) -> bool:
    """Whether there is work in a folder to go on with, or a finished one."""
    return bool(_there(folder)) or (folder / MANIFEST_FILE).is_file()


def _there(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.arrow")}


def shard_file(folder: Path, number: int) -> Path:
    """The file of a shard in its folder."""
    return folder / f"{number:05d}.arrow"


def digest_of(texts: Iterable[str]) -> str:
    """A checksum of texts and of where each ends."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d " % len(data) + data)
    return digest.hexdigest()


def _write_shard(file: Path, columns: Any, made_of: str, held: bool = True) -> None:
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _MADE_OF: made_of})
    with write_aside(file, held=held) as aside:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        with aside.open("rb+") as opened:  # after the stream, where its readers stop
            opened.write(xxhash.xxh3_128(opened.read()).digest())


def _compare(file: Path, made_of: str) -> None:
    """Refuse a shard of something else, or one that has changed since it was written: Arrow trusts what it opens."""
    content = memoryview(file.read_bytes())
    if xxhash.xxh3_128(content[:-16]).digest() != content[-16:]:
        raise ValueError(f"{file}: damaged (its checksum differs): {_RUN_AGAIN}")
    if (_opened(file).schema.metadata or {}).get(_MADE_OF, b"") != made_of.encode():
        what = "was made of other passages (a text, an id or their order differs)"
        raise ValueError(f"{file} {what}: {_BEGIN_AGAIN}")


def read_shard(folder: Path, number: int) -> Any:
    """A shard as a memory-mapped table, with the metadata it was made with."""
    table = _opened(_written(folder, number))
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != _MADE_OF}
    return table.replace_schema_metadata(metadata or None)


def _written(folder: Path, number: int) -> Path:
    file = shard_file(folder, number)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: run again what wrote the folder, and it makes this shard anew")
    return file


def _opened(file: Path) -> Any:
    try:
        return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: damaged ({error}): {_RUN_AGAIN}") from error


def _finish(folder: Path, shards: int, count: int, about: Any, kept: Collection[str]) -> None:
    if (more := shard_file(folder, shards)).is_file():
        ends = f"this one has {count:,} passages and ends before it"
        raise ValueError(f"{more} was made of another corpus ({ends}): {_BEGIN_AGAIN}")
    announced = _announced(folder)
    tables = [read_shard(folder, number) for number in range(shards)]
    entries = []
    for number, table in enumerate(tables):
        file, digest = shard_file(folder, number), str(file_digest(shard_file(folder, number)))
        if file.name in kept and announced.get(file.name, digest) != digest:
            raise _altered(file)
        entries.append({"file": file.name, "count": len(table), "sha256": digest})
    about = about(tables) if callable(about) else about
    manifest = {**read_claim(folder, _BEGIN_AGAIN), **about, "count": count, "shards": entries}
    write_json_atomic(folder / MANIFEST_FILE, {**manifest, _CHECKSUM: _checksum(manifest)})
    (folder / _JOBS_FILE).unlink(missing_ok=True)


def _announced(folder: Path) -> dict[str, str]:
    """The checksums of shards by the manifest, where there is one."""
    with suppress(FileNotFoundError, ValueError):
        return {entry["file"]: entry["sha256"] for entry in read_manifest(folder, "shards")["shards"]}
    return {}


def _altered(file: Path) -> ValueError:
    return ValueError(f"{file} is damaged or was altered (its checksum differs): {_RUN_AGAIN}")


def _checksum(manifest: Mapping[str, Any]) -> str:
    return digest_of([json.dumps(manifest, sort_keys=True)])


def read_manifest(folder: Path, what: str) -> dict[str, Any]:
    """The manifest of a finished folder; `what` names its content in messages."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        if (folder / CLAIM_FILE).is_file():
            raise FileNotFoundError(f"{folder}: {_missing(folder, what)}")
        raise FileNotFoundError(f"{folder}: no {what} here ({file.name} is missing); give the folder that has them")
    manifest: dict[str, Any] = read_json(file, _RUN_AGAIN)
    if manifest.get("format") != FORMAT:
        fix = "delete the folder, and run again what wrote it"
        raise ValueError(f"{folder}: {what} in the format of another version of tct_hf: {fix}")
    if manifest.pop(_CHECKSUM, None) != _checksum(manifest):
        raise _altered(file)
    claimed = folder / CLAIM_FILE
    settings = read_claim(folder, _RUN_AGAIN) if claimed.is_file() else {}
    if altered := [name for name, value in settings.items() if manifest.get(name) != value]:
        raise ValueError(f"{claimed} was altered, {altered[0]!r} is another in {file.name}: {_BEGIN_AGAIN}")
    return manifest


def checked_shards(folder: Path, manifest: Mapping[str, Any]) -> list[Any]:
    """All shards in order as memory-mapped tables, each file compared with its checksum in the manifest."""
    for number, entry in enumerate(manifest["shards"]):
        file = _written(folder, number)
        if file_digest(file) != entry["sha256"]:
            raise _altered(file)
    return [read_shard(folder, number) for number in range(len(manifest["shards"]))]
