"""A folder of encoded passages: shards of vectors with their ids, and the manifest that says what they are.

encoding.json     what is being encoded: model, encoding, precision; written first
00000.arrow       ids and vectors of a shard (of a sparse encoder the terms and weights of each passage), with
                  checksums of these and of the passages they were made of
manifest.json     written last: all of encoding.json, and each shard's count and checksum
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tct_hf.files import _first_difference, write_aside, write_json_atomic
from tct_hf.retrieval.rows import ShardedRows, ShardedVectors, finite_rows

PLAN_FILE = "encoding.json"
MANIFEST_FILE = "manifest.json"
_FORMAT = 2
_BEGIN_AGAIN = "choose another folder, or delete this one to begin again."


def load_vectors(
    directory: str | Path, *, mmap: bool = False, verify: bool = True
) -> tuple[list[str], Any, dict[str, Any]]:
    """Read what `encode_corpus` wrote.

    Args:
        directory: its folder.
        mmap: leave vectors on disk until they are used.
        verify: read every file, compare its checksum and refuse a NaN; without, only shapes are checked.

    Returns:
        Passage ids in the corpus's order; their vectors, `(passages, dim)` float32, an array, or `ShardedVectors` with
        `mmap`; of a sparse encoder a scipy CSR matrix, or `ShardedRows`, which gives rows as CSR; the manifest:
        "model" ("id", "weights_sha256"), "encoding", "precision", "dtype", "count", "dim", "shards", and of a sparse
        encoder "layout" ("sparse") and "nonzeros".

    Raises:
        FileNotFoundError: there is no finished folder, or a shard is missing.
        ValueError: a file is damaged or altered, an id is there twice, or a vector has a NaN; names the file.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    ids: list[str] = []
    parts: list[Any] = []
    for number, announced in enumerate(manifest["shards"]):
        shard = _Shard(folder, number, manifest, announced["count"])
        if verify:
            shard.check(announced["sha256"])
            shard.refuse_not_finite()
        parts.append(shard.arrays)
        ids += shard.ids
    if len(ids) != manifest["count"]:
        raise ValueError(f"{folder}: {len(ids)} vectors where {manifest['count']} are announced; encode again")
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise ValueError(f"{folder}: two passages have the id {twice!r}: give each its own id, and encode again")
    if _is_sparse(manifest):
        rows = ShardedRows(parts, manifest["dim"])
        return ids, rows if mmap else rows.tocsr(), manifest
    vectors = ShardedVectors([part for (part,) in parts], manifest["dim"])
    return ids, vectors if mmap else vectors[:], manifest


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a finished folder, see `load_vectors`; FileNotFoundError where the encoding is not finished."""
    folder = Path(directory)
    if not (folder / MANIFEST_FILE).is_file():
        if (folder / PLAN_FILE).is_file():
            raise FileNotFoundError(f"{folder}: the encoding is not finished; run it again, and it goes on")
        raise FileNotFoundError(f"{folder}: no encoded corpus here ({MANIFEST_FILE} is missing); encode one first")
    return _read(folder / MANIFEST_FILE)


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = content["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: damaged ({error!r}): {_BEGIN_AGAIN}") from error
    if found != _FORMAT:
        raise ValueError(f"{file}: format {found} where this version reads {_FORMAT}: {_BEGIN_AGAIN}")
    return content


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.arrow"


def _is_sparse(settings: Mapping[str, Any]) -> bool:
    return settings.get("layout") == "sparse"


class _Shard:
    """A shard on disk, mapped; it must have the dtype, and the "dim" and count where they are given."""

    def __init__(self, folder: Path, number: int, settings: Mapping[str, Any], count: int | None = None) -> None:
        self.file = _file(folder, number)
        self.fix = f"delete {self.file.name} there, and encode again into the folder"
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file} is missing: {self.fix}")
        try:
            with pa.memory_map(str(self.file)) as source:
                table = pa.ipc.open_file(source).read_all()
            self.record = json.loads(table.schema.metadata[b"tct_hf"])
            self.ids: list[str] = table["id"].to_pylist()
            columns = [column.chunk(0) for column in table.columns[1:]]
            flat = [column.flatten().to_numpy(zero_copy_only=True) for column in columns]
            self.dim: int = self.record["dim"]
            if _is_sparse(settings):
                terms, weights = flat
                self.arrays: list[np.ndarray] = [columns[0].offsets.to_numpy(zero_copy_only=True), terms, weights]
                self.dtype = weights.dtype
            else:
                self.arrays = [flat[0].reshape(len(self.ids), self.dim)]
                self.dtype = flat[0].dtype
        except (OSError, ValueError, KeyError, TypeError, IndexError, pa.ArrowException) as error:
            raise ValueError(f"{self.file} is damaged ({error}): {self.fix}") from error
        shape = len(self.ids), self.dim
        wanted = len(self.ids) if count is None else count, settings.get("dim", self.dim)
        if shape != wanted or self.dtype.name != settings["dtype"]:
            raise ValueError(
                f"{self.file}: {self.dtype} of shape {shape}, where {settings['dtype']} of {wanted} is announced: "
                f"{self.fix}"
            )

    def check(self, announced: str) -> None:
        """Compare the checksum of ids and vectors with what was announced."""
        if not self.record["sha256"] == announced == _content_digest(self.ids, self.arrays):
            raise ValueError(f"{self.file} is damaged or was altered (its checksum differs): {self.fix}")

    def refuse_not_finite(self) -> None:
        """Refuse vectors with a NaN, or with a term beyond the dimensions."""
        if len(self.arrays) > 1:
            _, terms, weights = self.arrays
            if not np.isfinite(weights).all() or terms.max(initial=0) >= self.dim:
                raise ValueError(
                    f"{self.file}: a weight is NaN or infinite, or a term is beyond the {self.dim} of a vector: "
                    f"{self.fix}"
                )
            return
        for start in range(0, len(self.ids), 65_536):
            finite = finite_rows(self.arrays[0][start : start + 65_536])
            if not finite.all():
                row = start + int(finite.argmin())
                raise ValueError(
                    f"{self.file}: row {row} (passage {self.ids[row]!r}) has a NaN or infinite component: check the "
                    f"model, then {self.fix}"
                )


def _content_digest(ids: Sequence[str], arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256("\0".join(ids).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _passages_digest(passages: Sequence[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for passage_id, text in passages:
        digest.update(f"{passage_id}\0{text}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def begin(
    folder: Path, settings: Mapping[str, Any], precision: str, choose: Callable[[], tuple[bool, dict[str, Any]]]
) -> None:
    """Record what will be encoded into a folder, or refuse it when it holds something else."""
    plan = folder / PLAN_FILE
    # A folder that was begun without a whole shard has nothing to lose.
    if plan.is_file() and (finished_shards(folder) or (folder / MANIFEST_FILE).is_file()):
        before = read_plan(folder)
        now = {
            **json.loads(json.dumps(settings)),
            "precision": before["precision"] if precision == "auto" else precision,
        }
        models = [side["model"] for side in (before, now)]
        if models[0]["weights_sha256"] != models[1]["weights_sha256"]:
            was, is_now = (f"{model['id']} (weights {model['weights_sha256'][:12]})" for model in models)
            raise ValueError(f"{folder} holds vectors of the model {was}, but now it is {is_now}: {_BEGIN_AGAIN}")
        compared = [key for key in now if key != "model"]  # the same weights may lie in another place
        sides = [{key: side.get(key) for key in compared} for side in (before, now)]
        if found := _first_difference(sides[0], sides[1]):
            name, was, is_now = found
            raise ValueError(
                f"{folder} holds vectors with {name} = {was!r}, but now {name} = {is_now!r}: {_BEGIN_AGAIN}"
            )
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


def read_plan(folder: Path) -> dict[str, Any]:
    """What is being encoded into a folder, with the precision that was chosen."""
    return _read(folder / PLAN_FILE)


def finished_shards(folder: Path) -> set[int]:
    """Numbers of the shards that are there."""
    return {int(file.stem) for file in folder.glob("*.arrow") if file.stem.isdecimal()}


def write_shard(folder: Path, number: int, passages: Sequence[tuple[str, str]], vectors: Any) -> None:
    """Write a shard of passages, ids and texts, with vectors `(passages, dim)`, an array or CSR rows."""
    ids = [passage_id for passage_id, _ in passages]
    if isinstance(vectors, np.ndarray):
        arrays = [np.ascontiguousarray(vectors)]
        columns = {"vector": pa.FixedSizeListArray.from_arrays(pa.array(arrays[0].reshape(-1)), vectors.shape[1])}
    else:
        arrays = [vectors.indptr.astype(np.int64), vectors.indices.astype(np.uint32), vectors.data]
        lists = [pa.LargeListArray.from_arrays(pa.array(arrays[0]), pa.array(values)) for values in arrays[1:]]
        columns = dict(zip(("terms", "weights"), lists, strict=True))
    record = {
        "dim": vectors.shape[1],
        "sha256": _content_digest(ids, arrays),
        "passages_sha256": _passages_digest(passages),
    }
    table = pa.table({"id": pa.array(ids, pa.string()), **columns}, metadata={"tct_hf": json.dumps(record)})
    with write_aside(_file(folder, number)) as aside, pa.ipc.new_file(str(aside), table.schema) as writer:
        writer.write_table(table)


def check_shard(folder: Path, number: int, passages: Sequence[tuple[str, str]], *, vectors: bool) -> None:
    """Refuse a shard that was made of other ids and texts, or whose `vectors`, read where asked, are damaged."""
    shard = _Shard(folder, number, read_plan(folder))
    now = [passage_id for passage_id, _ in passages]
    if shard.record["passages_sha256"] != _passages_digest(passages):
        differs = next((i for i, pair in enumerate(zip(shard.ids, now, strict=False)) if pair[0] != pair[1]), None)
        what = "the ids are the same, but a text is not"
        if differs is not None:
            what = f"passage {differs} of it was {shard.ids[differs]!r}, but now is {now[differs]!r}"
        elif len(shard.ids) != len(now):
            what = f"it has {len(shard.ids)} passages, but now there are {len(now)}"
        raise ValueError(f"{shard.file} was made of another corpus ({what}): {_BEGIN_AGAIN}")
    if shard.ids != now:
        raise ValueError(f"{shard.file} is damaged or was altered (its ids): {shard.fix}")
    if vectors:
        shard.check(shard.record["sha256"])


def finish(folder: Path, shards: int, count: int, *, kept: Collection[int] = ()) -> None:
    """Write the manifest of so many shards and passages, all of which must be there.

    A manifest of an earlier call must announce the shards that were `kept` as they are.
    """
    if more := sorted(finished_shards(folder) - set(range(shards))):
        raise ValueError(
            f"{_file(folder, more[0])} was made of another corpus (this one has {count} passages and ends before "
            f"it): {_BEGIN_AGAIN}"
        )
    try:
        announced = read_manifest(folder)["shards"]
    except (FileNotFoundError, ValueError):
        announced = []
    plan = read_plan(folder)
    entries: list[dict[str, Any]] = []
    dims, nonzeros = set(), 0
    for number in range(shards):
        shard = _Shard(folder, number, plan)
        dims.add(shard.dim)
        nonzeros += len(shard.arrays[-1])
        digest = shard.record["sha256"]
        entries.append({"file": shard.file.name, "count": len(shard.ids), "sha256": digest})
        if number in kept and number < len(announced) and announced[number]["sha256"] != digest:
            raise ValueError(
                f"{shard.file} is damaged or was altered ({MANIFEST_FILE} announces another checksum): {shard.fix}"
            )
    if sum(entry["count"] for entry in entries) != count or len(dims) != 1:
        raise ValueError(f"{folder}: shards that don't fit this corpus of {count} passages: {_BEGIN_AGAIN}")
    manifest = {**plan, "count": count, "dim": dims.pop(), "shards": entries}
    if _is_sparse(plan):
        manifest["nonzeros"] = nonzeros
    write_json_atomic(folder / MANIFEST_FILE, manifest)
