"""Write queries that each passage of a collection might answer (doc2query), to expand an index of words with.

accelerate launch recipes/expand.py [settings.yaml] --source PATH --output_dir DIR [--teacher PATH] [--setting value]

The queries stay apart from the passages: an index decides how many it takes. With a teacher, each is scored, so that
an index can leave out the worst. If it is stopped, the same command resumes after the last whole shard. Several
processes share the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tct_hf.pipeline import one_row
from tct_hf.pipeline.checks import check_part
from tct_hf.pipeline.settings import OneTeacher
from tct_hf.settings import SettingsError, run_recipe, setting


@dataclass
class Settings:
    model: str = setting("castorini/doc2query-t5-base-msmarco", "folder or Hub id of a seq2seq model")
    source: str = setting(
        "builtin",
        '"builtin" (API docs of installed packages), a folder (BEIR, Markdown or text files), a Hub id, or irds:ID',
    )
    packages: list[str] = setting(["numpy", "scipy", "pandas", "sklearn"], "packages of the built-in corpus")
    output_dir: str = setting("outputs/expand", "where queries, their scores and the manifest are written")
    skip_bad_rows: bool = setting(False, "skip bad and repeated passages and say which")
    num_queries: int = setting(40, "queries generated for each passage")
    top_k: int = setting(10, "number of most probable tokens to sample from")
    max_length: int = setting(64, "maximum length of a query in tokens")
    passage_length: int = setting(512, "maximum length of a passage in tokens")
    prompt: str = setting("", "prefix of each passage, for models trained with one")
    seed: int = setting(13, "random seed; a passage's queries do not depend on how the work is split")
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto", "compute dtype; auto: bfloat16 where the hardware has it"
    )
    shard_size: int = setting(1024, "passages a shard; an interruption loses at most one shard")
    tokens_per_pass: int | None = setting(
        None, "passage tokens times queries a forward pass; chosen by the device when null"
    )
    teacher: str | None = setting(None, "folder or Hub id of a model that scores the queries; no scores when null")
    kind: Literal["colbert", "cross-encoder"] = setting("colbert", "type of the teacher")
    batch_size: int = setting(256, "pairs that the teacher scores together")
    progress_every: float = setting(10.0, "seconds between lines of progress")


def main(settings: Settings) -> None:
    from tct_hf import expand_corpus
    from tct_hf.data.collection import read_corpus
    from tct_hf.pipeline.job import Job

    if settings.teacher is not None:
        check_part(OneTeacher(kind=settings.kind, model=settings.teacher), "", model="teacher")
    for name in ("num_queries", "top_k", "max_length", "passage_length", "shard_size", "batch_size"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"{name}: must be at least 1, got {getattr(settings, name)}")
    job = Job(["data", "expand", *([] if settings.teacher is None else ["score"])])
    with job.first("data"):
        how = {"allow_empty": True, "skip_bad_rows": settings.skip_bad_rows}
        corpus = read_corpus(settings.source, settings.packages, **how)
        job.write(f"  {settings.source}: {len(corpus):,} passages, with {settings.model} on {job.state.device}")
    with job.stage("expand"):
        sampling = ("num_queries", "top_k", "max_length", "passage_length", "prompt", "seed")
        manifest = expand_corpus(
            settings.model,
            corpus,
            settings.output_dir,
            **{name: getattr(settings, name) for name in (*sampling, "dtype", "shard_size", "tokens_per_pass")},
            state=job.state,
            write_every=settings.progress_every,
        )
    if settings.teacher is not None:
        with job.stage("score"):
            score(settings, settings.teacher, corpus, job.state)
    job.record(settings)
    if job.is_main:
        print(f"\n{table(manifest, settings)}", flush=True)
    job.finish()


def score(settings: Settings, name: str, corpus: Any, state: Any) -> None:
    from tct_hf import score_expansions
    from tct_hf.pipeline.models import make_part
    from tct_hf.teachers.colbert import describe_teacher

    teacher: Any = make_part(OneTeacher(kind=settings.kind, model=name), dtype=settings.dtype)
    score_expansions(
        teacher,
        corpus,
        settings.output_dir,
        depends={"teacher": describe_teacher(teacher.model), "kind": settings.kind, "dtype": settings.dtype},
        batch_size=settings.batch_size,
        state=state,
        write_every=settings.progress_every,
    )


def table(manifest: dict[str, Any], settings: Settings) -> str:
    from tct_hf import load_expansions

    folder = Path(settings.output_dir)
    queries = words = distinct = 0
    for texts in load_expansions(folder)["queries"]:
        queries += len(texts)
        distinct += len(set(texts))
        words += sum(len(text.split()) for text in texts)
    cells = {
        "passages": f"{manifest['count']:,}",
        "queries": f"{queries:,}",
        "words a query": f"{words / queries:.1f}" if queries else "",
        "distinct": f"{distinct / queries:.1%}" if queries else "",
        "scored": "no" if settings.teacher is None else settings.kind,
        "shards": f"{len(manifest['shards']):,}",
        "bytes a passage": f"{sum(f.stat().st_size for f in folder.glob('*.arrow')) / manifest['count']:,.0f}",
        "folder": str(folder),
    }
    return one_row(cells)


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
