"""A folder of encoded passages: shards of vectors with their ids, and the manifest that says what they are.

encoding.json     what is being encoded: model, encoding, precision; written first
00000.npy         vectors of a shard, (passages, dim); of a sparse encoder their non-zeros as (term, weight) pairs
00000.json        its ids, checksums of vectors and passages; written after the vectors, so that it announces them
manifest.json     written last: all of encoding.json, and each shard's files by checksum
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.files import _first_difference, file_digest, write_json_atomic
from tct_hf.retrieval.vector_blocks import ShardedVectors

if TYPE_CHECKING:
    import numpy as np

PLAN_FILE = "encoding.json"
MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_BEGIN_AGAIN = "choose another folder, or delete this one to begin again."


def load_vectors(
    directory: str | Path, *, mmap: bool = False, verify: bool = True
) -> tuple[list[str], Any, dict[str, Any]]:
    """Read what `encode_corpus` wrote.

    Args:
        directory: its folder.
        mmap: leave vectors on disk until they are used.
        verify: read every file and compare its checksum, and refuse vectors with a NaN; without, only counts and
            dimensions are checked.

    Returns:
        Passage ids in the corpus's order; their vectors, `(passages, dim)` float32, an array, or `ShardedVectors` with
        `mmap`; of a sparse encoder a scipy CSR matrix, or `ShardedRows`, which gives rows as CSR; the manifest:
        "model" ("id", "weights_sha256"), "encoding", "precision", "dtype", "count", "dim", "shards", and of a sparse
        encoder "layout" ("sparse") and "nonzeros".

    Raises:
        FileNotFoundError: there is no finished folder, or a shard is missing.
        ValueError: a file is damaged or altered, an id is there twice, or a vector has a NaN; names the file.
    """
    import numpy as np

    folder = Path(directory)
    manifest = read_manifest(folder)
    ids: list[str] = []
    parts: list[Any] = []
    for number, announced in enumerate(manifest["shards"]):
        part, part_ids = _read_shard(folder, number, announced, manifest, verify)
        parts.append(part)
        ids += part_ids
    if len(ids) != manifest["count"]:
        raise ValueError(f"{folder}: {len(ids)} vectors where {manifest['count']} are announced; encode again")
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise ValueError(f"{folder}: two passages have the id {twice!r}: give each its own id, and encode again")
    if _is_sparse(manifest):
        from tct_hf.retrieval.sparse_rows import ShardedRows

        rows = ShardedRows(parts, manifest["dim"])
        return ids, rows if mmap else rows.tocsr(), manifest
    if mmap:
        return ids, ShardedVectors(parts, manifest["dim"]), manifest
    vectors = np.empty((len(ids), manifest["dim"]), dtype=np.float32)
    start = 0
    for part in parts:
        vectors[start : start + len(part)] = part
        start += len(part)
    return ids, vectors, manifest


def _read_shard(
    folder: Path, number: int, announced: Mapping[str, Any], manifest: Mapping[str, Any], verify: bool
) -> tuple[Any, list[str]]:
    import numpy as np

    vectors_file, record_file = _files(folder, number)
    mend = f"delete {vectors_file.stem}.npy and {vectors_file.stem}.json there, and encode again into the folder"
    for file, digest in ((vectors_file, announced["vectors_sha256"]), (record_file, announced["record_sha256"])):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {mend}")
        if verify and file_digest(file) != digest:
            raise ValueError(f"{file} is damaged or was altered (its checksum differs): {mend}")
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        ids = record["ids"]
        if _is_sparse(manifest):
            return _read_sparse(vectors_file, record, announced["count"], manifest["dim"], verify), ids
        part = np.load(vectors_file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{vectors_file}: damaged shard ({error}): {mend}") from error
    wanted = (announced["count"], manifest["dim"])
    if part.shape != wanted or len(ids) != wanted[0] or part.dtype != np.dtype(manifest["dtype"]):
        raise ValueError(
            f"{vectors_file}: {part.dtype} of shape {part.shape} with {len(ids)} ids, where {manifest['dtype']} of "
            f"{wanted} is announced: {mend}"
        )
    if verify:
        for start in range(0, len(part), 65536):
            finite = np.isfinite(part[start : start + 65536]).all(axis=1)
            if not finite.all():
                row = start + int(np.flatnonzero(~finite)[0])
                raise ValueError(
                    f"{vectors_file}: row {row} (passage {ids[row]!r}) has a NaN or infinite component: check the "
                    f"model, then {mend}"
                )
    return part, ids


def _is_sparse(settings: Mapping[str, Any]) -> bool:
    return settings.get("layout") == "sparse"


def _read_sparse(
    file: Path, record: Mapping[str, Any], count: int, dim: int, verify: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of a shard and where rows begin."""
    import numpy as np

    from tct_hf.retrieval.sparse_rows import open_pairs

    if not len(record["ids"]) == len(record["nonzeros"]) == count:
        raise ValueError(f"{len(record['ids'])} ids and {len(record['nonzeros'])} vectors where {count} are announced")
    pairs, begins = open_pairs(file, record["nonzeros"])
    if verify and not (np.isfinite(pairs["weight"]).all() and pairs["term"].max(initial=0) < dim):
        raise ValueError(f"a weight is NaN or infinite, or a term is beyond the {dim} of a vector")
    return pairs, begins


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a finished folder; see `load_vectors`.

    Args:
        directory: the folder.

    Raises:
        FileNotFoundError: there is none, or the encoding is not finished.
        ValueError: it is damaged or of another format.
    """
    folder = Path(directory)
    if not (folder / MANIFEST_FILE).is_file():
        if (folder / PLAN_FILE).is_file():
            raise FileNotFoundError(f"{folder}: the encoding is not finished; run it again, and it goes on")
        raise FileNotFoundError(f"{folder}: no encoded corpus here ({MANIFEST_FILE} is missing); encode one first")
    return _read(folder / MANIFEST_FILE, ("format", "model", "dtype", "count", "dim", "shards"))


def _read(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in content]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: damaged ({error}): {_BEGIN_AGAIN}") from error
    if missing or not isinstance(content, dict):
        raise ValueError(f"{file}: damaged, {', '.join(missing) or 'all'} is missing: {_BEGIN_AGAIN}")
    if content.get("format", _FORMAT) != _FORMAT:
        raise ValueError(f"{file}: format {content['format']} where this version reads {_FORMAT}: {_BEGIN_AGAIN}")
    return content


def _files(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:05d}.npy", folder / f"{number:05d}.json"


def begin(
    folder: Path, settings: Mapping[str, Any], precision: str, choose: Callable[[], tuple[bool, dict[str, Any]]]
) -> None:
    """Record what will be encoded into a folder, or refuse it when it holds something else.

    Args:
        folder: made when missing.
        settings: JSON-ready, all that vectors depend on but the precision.
        precision: "bf16", "fp32", or "auto": as the folder was begun, else as `choose` finds.
        choose: whether bfloat16 is right, and why.

    Raises:
        ValueError: the folder holds vectors of other settings; says what differs.
        FileExistsError: the folder holds something else.
    """
    plan = folder / PLAN_FILE
    # A folder that was begun without a whole shard has nothing to lose.
    if plan.is_file() and (finished_shards(folder) or (folder / MANIFEST_FILE).is_file()):
        before = read_plan(folder)
        now = {
            **json.loads(json.dumps(settings)),
            "precision": before["precision"] if precision == "auto" else precision,
        }
        _refuse_other(folder, before, now)
    else:
        # Hidden files: what a killed process was writing aside.
        others = folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir())
        if others and not plan.is_file():
            raise FileExistsError(f"{folder}: holds something other than an encoded corpus; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        chosen, why = choose() if precision == "auto" else (precision == "bf16", {"asked": precision})
        record = {**settings, "precision": "bf16" if chosen else "fp32", "precision_probe": why}
        write_json_atomic(plan, {"format": _FORMAT, **record})
    for left in folder.glob(".*.tmp"):  # by a killed process
        left.unlink()


def _refuse_other(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    models = [side["model"] for side in (before, now)]
    if models[0]["weights_sha256"] != models[1]["weights_sha256"]:
        was, is_now = (f"{model['id']} (weights {model['weights_sha256'][:12]})" for model in models)
        raise ValueError(f"{folder} holds vectors of the model {was}, but now it is {is_now}: {_BEGIN_AGAIN}")
    # The same weights may lie in another place; a folder of an earlier version does not say all that is compared now.
    compared = [key for key in now if key != "model" and key in before]
    if found := _first_difference({key: before.get(key) for key in compared}, {key: now[key] for key in compared}):
        name, was, is_now = found
        raise ValueError(f"{folder} holds vectors with {name} = {was!r}, but now {name} = {is_now!r}: {_BEGIN_AGAIN}")


def read_plan(folder: Path) -> dict[str, Any]:
    """What is being encoded into a folder, with the precision that was chosen."""
    return _read(folder / PLAN_FILE, ("format", "model", "encoding", "precision", "dtype", "shard_size"))


def _announced(folder: Path) -> list[dict[str, Any]]:
    """The shards of the manifest that is there; none where there is no manifest, or one that can't be read."""
    try:
        shards: list[dict[str, Any]] = _read(folder / MANIFEST_FILE, ("shards",))["shards"]
    except (FileNotFoundError, ValueError):
        return []
    return shards


def finished_shards(folder: Path) -> set[int]:
    """Numbers of the shards that are whole."""
    numbers = {int(file.stem) for file in folder.glob("*.json") if file.stem.isdecimal()}
    return {number for number in numbers if _files(folder, number)[0].is_file()}


def check_shard(folder: Path, number: int, passages: Sequence[tuple[str, str]], *, vectors: bool) -> None:
    """Refuse a shard that was made of other passages, or is damaged.

    Args:
        folder: the folder.
        number: of the shard.
        passages: ids and texts that it should hold.
        vectors: compare the checksum of its vectors too.

    Raises:
        ValueError: it holds others, or is damaged.
    """
    import numpy as np

    vectors_file, record_file = _files(folder, number)
    record = _read(record_file, ("count", "dim", "ids", "passages_sha256", "vectors_sha256"))
    if record["passages_sha256"] != _passages_digest(passages):
        before, now = record["ids"], [passage_id for passage_id, _ in passages]
        differs = next((i for i, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), None)
        if differs is not None:
            what = f"passage {differs} of it was {before[differs]!r}, but now is {now[differs]!r}"
        elif len(before) != len(now):
            what = f"it has {len(before)} passages, but now there are {len(now)}"
        else:
            what = "the ids are the same, but a text is not"
        raise ValueError(f"{record_file} was made of another corpus ({what}): {_BEGIN_AGAIN}")
    if record["count"] != len(passages) or record["ids"] != [passage_id for passage_id, _ in passages]:
        raise _altered(record_file, vectors_file, "its ids are not those of its passages")
    if vectors:
        if file_digest(vectors_file) != record["vectors_sha256"]:
            raise _altered(vectors_file, record_file, "its checksum differs")
        shape = np.load(vectors_file, mmap_mode="r", allow_pickle=False).shape
        wanted = (sum(record["nonzeros"]),) if "nonzeros" in record else (record["count"], record["dim"])
        if shape != wanted:
            raise _altered(record_file, vectors_file, f"it announces {' x '.join(map(str, wanted))} of {shape}")


def _altered(file: Path, beside: Path, why: str) -> ValueError:
    return ValueError(
        f"{file} is damaged or was altered ({why}): delete it and {beside.name}, and encode again into the folder."
    )


def _passages_digest(passages: Sequence[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for passage_id, text in passages:
        digest.update(f"{passage_id}\0{text}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def write_shard(folder: Path, number: int, passages: Sequence[tuple[str, str]], vectors: Any) -> None:
    """Write a shard, vectors first, each file aside and renamed.

    Args:
        folder: the folder.
        number: of the shard.
        passages: ids and texts.
        vectors: `(passages, dim)`, an array or CSR rows.

    Raises:
        OSError: it can't be written.
    """
    import numpy as np

    from tct_hf.retrieval.sparse_rows import as_pairs, is_sparse

    sparse = is_sparse(vectors)
    vectors_file, record_file = _files(folder, number)
    aside = vectors_file.with_name(f".{vectors_file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with aside.open("xb") as file:
            np.save(file, as_pairs(vectors) if sparse else np.ascontiguousarray(vectors), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        digest = file_digest(aside)
        os.replace(aside, vectors_file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    record = {
        "count": len(passages),
        "dim": vectors.shape[1],
        "vectors_sha256": digest,
        "passages_sha256": _passages_digest(passages),
        "ids": [passage_id for passage_id, _ in passages],
    }
    if sparse:
        record["nonzeros"] = np.diff(vectors.indptr).tolist()
    write_json_atomic(record_file, record)


def finish(folder: Path, shards: int, count: int, *, kept: Collection[int] = ()) -> None:
    """Write the manifest once every shard is there.

    Args:
        folder: the folder.
        shards: how many there are.
        count: passages in all.
        kept: numbers of the shards that an earlier call wrote; where there is a manifest, it must announce them as
            they are.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: there are more shards than the corpus has, their counts don't sum up, or a shard that was kept is
            not what the manifest announces.
    """
    found = finished_shards(folder)
    if missing := sorted(set(range(shards)) - found):
        raise FileNotFoundError(f"{_files(folder, missing[0])[1]} is missing: encode again into the folder")
    if more := sorted(found - set(range(shards))):
        raise ValueError(
            f"{_files(folder, more[0])[1]} was made of another corpus (this one has {count} passages and ends before "
            f"it): {_BEGIN_AGAIN}"
        )
    announced = _announced(folder)
    entries: list[dict[str, Any]] = []
    dims, nonzeros = set(), 0
    for number in range(shards):
        vectors_file, record_file = _files(folder, number)
        record = _read(record_file, ("count", "dim", "vectors_sha256"))
        dims.add(record["dim"])
        nonzeros += sum(record.get("nonzeros", ()))
        entries.append(
            {
                "file": vectors_file.name,
                "count": record["count"],
                "vectors_sha256": record["vectors_sha256"],
                "record_sha256": file_digest(record_file),
            }
        )
        if number in kept and number < len(announced):
            for file, beside, key in (
                (vectors_file, record_file, "vectors_sha256"),
                (record_file, vectors_file, "record_sha256"),
            ):
                if announced[number].get(key) != entries[-1][key]:
                    raise _altered(file, beside, f"{MANIFEST_FILE} announces another checksum")
    if sum(entry["count"] for entry in entries) != count:
        raise ValueError(
            f"{folder}: shards of {sum(e['count'] for e in entries)} passages for {count}: {_BEGIN_AGAIN}"
        )
    if len(dims) != 1:
        raise ValueError(f"{folder}: shards of {sorted(dims)} dimensions: {_BEGIN_AGAIN}")
    plan = read_plan(folder)
    manifest = {**plan, "count": count, "dim": dims.pop(), "shards": entries}
    if _is_sparse(plan):
        manifest["nonzeros"] = nonzeros
    write_json_atomic(folder / MANIFEST_FILE, manifest)
