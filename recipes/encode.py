"""Encode the passages of a collection with a dense or sparse student, into a folder of vectors to build an index from.

accelerate launch recipes/encode.py [settings.yaml] --model PATH --source PATH --output_dir DIR [--setting value ...]

If it is stopped, the same command resumes after the last whole shard. Several processes share the work; so do jobs
that have only the output folder in common: the same command with --shard_index 0 --num_shards 4, and so on to 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tct_hf.pipeline import one_row
from tct_hf.settings import SettingsError, run_recipe, setting


@dataclass
class Settings:
    model: str | None = setting(None, "folder or Hub id of a SentenceTransformer or SparseEncoder, or a bundled model")
    source: str = setting(
        "builtin",
        '"builtin" (API docs of installed packages), a folder (BEIR, Markdown or text files), a Hub id, or irds:ID',
    )
    packages: list[str] = setting(["numpy", "scipy", "pandas", "sklearn"], "packages of the built-in corpus")
    output_dir: str = setting("outputs/encode", "where vectors and their manifest are written")
    precision: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "compute precision; auto: bf16 where the hardware has it and the vectors stay the same"
    )
    backend: Literal["auto", "torch", "openvino"] = setting(
        "auto",
        "what computes; auto: OpenVINO on the CPU where it is installed and as good (extra: openvino)",
    )
    truncate_dim: int | None = setting(
        None, "number of first dimensions to keep, for Matryoshka students; all when null"
    )
    dtype: Literal["float32", "float16"] = setting("float32", "dtype of the stored vectors")
    shard_size: int = setting(4096, "passages a shard; an interruption loses at most one shard")
    tokens_per_pass: int | None = setting(None, "tokens a forward pass; chosen by the device when null")
    shard_index: int = setting(0, "number of this job, from 0, where several share nothing but the output folder")
    num_shards: int = setting(1, "how many such jobs there are; the last of them to end finishes the folder")
    allow_empty: bool = setting(False, "encode passages without text instead of refusing them")
    skip_bad_rows: bool = setting(False, "skip bad and repeated passages and say which")
    parquet: str | None = setting(None, "folder for the vectors as parquet files, too, as Anserini reads them")
    progress_every: float = setting(10.0, "seconds between lines of progress")


def main(settings: Settings) -> None:
    from tct_hf.data.collection import read_corpus
    from tct_hf.evaluation.workspace import open_student
    from tct_hf.progress import quieten
    from tct_hf.retrieval.anserini import write_anserini
    from tct_hf.retrieval.encode_corpus import encode_corpus
    from tct_hf.training.stages import process_state

    if settings.model is None:
        raise SettingsError("model: name the folder or Hub id of the model to encode with, --model PATH")
    if not 0 <= settings.shard_index < settings.num_shards:
        at, of = settings.shard_index, settings.num_shards
        raise SettingsError(f"shard_index, num_shards: {at} of {of}; jobs are numbered from 0 to num_shards - 1")
    job = (settings.shard_index, settings.num_shards) if settings.num_shards > 1 else None
    if job is not None and settings.parquet is not None:
        raise SettingsError(
            "parquet: a job has only its own part of the vectors; when all jobs have ended, run this command without "
            "shard_index and num_shards, which encodes nothing again"
        )
    quieten()
    state = process_state()
    how = {"allow_empty": settings.allow_empty}
    with state.main_process_first():
        corpus = read_corpus(settings.source, settings.packages, skip_bad_rows=settings.skip_bad_rows, **how)
    model = open_student(settings.model, str(state.device))
    if settings.truncate_dim is not None:
        cut(model, settings.truncate_dim)
    if state.is_main_process:
        print(f"{settings.source}: {len(corpus):,} passages, with {settings.model} on {state.device}", flush=True)
    manifest = encode_corpus(
        model,
        corpus,
        settings.output_dir,
        model_id=settings.model,
        **{
            name: getattr(settings, name)
            for name in ("precision", "backend", "dtype", "shard_size", "tokens_per_pass")
        },
        **how,
        job=job,
        state=state,
        write_every=settings.progress_every,
    )
    if job is not None and not manifest:
        print(f"job {job[0]} of {job[1]} (from 0) has ended; shards of others are missing", flush=True)
    elif state.is_main_process:
        print("\n" + summary(manifest, Path(settings.output_dir)))
        if settings.parquet is not None:
            files = write_anserini(settings.output_dir, settings.parquet)
            print(f"{len(files):,} parquet {'file' if len(files) == 1 else 'files'} in {settings.parquet}")
    state.destroy_process_group()


def cut(model: Any, size: int) -> None:
    from sentence_transformers import SparseEncoder

    if isinstance(model, SparseEncoder):
        raise SettingsError("truncate_dim: a sparse student's dimensions are words, its first are no smaller student")
    whole = model.get_embedding_dimension()
    if not 0 < size <= whole:
        raise SettingsError(f"truncate_dim: {size} is not between 1 and the {whole} dimensions of the vectors")
    model.truncate_dim = size


def summary(manifest: dict[str, Any], folder: Path) -> str:
    size = sum((folder / shard["file"]).stat().st_size for shard in manifest["shards"])
    cells = {
        "passages": f"{manifest['count']:,}",
        "dim": str(manifest["dim"]),
        "computed in": manifest["precision"] + (" by OpenVINO" if manifest["backend"] == "openvino" else ""),
        "stored in": manifest["dtype"],
        **({"active dims": f"{manifest['nonzeros'] / manifest['count']:,.1f}"} if "nonzeros" in manifest else {}),
        "shards": str(len(manifest["shards"])),
        "bytes a passage": f"{size / manifest['count']:,.0f}",
        "folder": str(folder),
    }
    return one_row(cells)


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
