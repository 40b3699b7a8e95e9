"""Write a teacher's scores of a set of triples, each query's own candidates, to distil them without the teacher.

accelerate launch recipes/score.py [settings.yaml] --triples.path PATH --teacher PATH_OR_URL [--kind cross-encoder]
    --output_dir DIR [--setting value ...]

Writes parquet shards in DIR/triples (recipes/train.py takes them as --triples.path, with --teacher.kind stored) and
summary.json, which says what the scores are and their range. If it is stopped, the same command resumes after the
last whole shard. Several processes share the work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tct_hf.pipeline import one_row
from tct_hf.pipeline.checks import check_part
from tct_hf.pipeline.settings import OneTeacher, TriplesSettings
from tct_hf.settings import SettingsError, run_recipe, setting


@dataclass
class Settings:
    output_dir: str = setting("outputs/score", "where everything is written")
    teacher: str | None = setting(None, "folder or Hub id of the model that scores, or the URL of a server")
    kind: Literal["colbert", "cross-encoder", "causal", "url"] = setting("colbert", "type of the teacher")
    key_env: str | None = setting(None, "url: name of the environment variable that holds the server's key")
    options: dict[str, Any] = setting({}, "more arguments of the teacher, such as {max_length: 512}")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "compute dtype")
    rows_a_shard: int = setting(4096, "rows a shard; an interruption loses at most one shard")
    batch_size: int = setting(32, "rows scored at once")
    triples: TriplesSettings = field(default_factory=TriplesSettings)


def main(settings: Settings) -> None:
    from tct_hf.pipeline.data import read_triples
    from tct_hf.pipeline.job import Job
    from tct_hf.pipeline.models import make_part
    from tct_hf.teachers.colbert import describe_teacher
    from tct_hf.teachers.scoring import score_triples

    if settings.teacher is None:
        raise SettingsError("teacher: name the folder or Hub id of the model that scores, or a URL, --teacher PATH")
    if settings.triples.path is None:
        raise SettingsError("triples.path: name the triples that are scored, --triples.path PATH")
    if settings.triples.streaming:
        raise SettingsError("triples.streaming: shards are parts of a whole that is read first; leave it out")
    part = OneTeacher(settings.kind, settings.teacher, key_env=settings.key_env, options=settings.options)
    check_part(part, "", model="teacher")
    job = Job(["data", "score"])
    with job.first("data"):
        rows = read_triples(settings.triples, seed=0, write=job.write)
    with job.stage("score"):
        teacher: Any = make_part(part, dtype=settings.dtype)
        of = teacher.identity if settings.kind == "url" else describe_teacher(teacher.model)
        depends = {"teacher": of, "kind": settings.kind, "dtype": settings.dtype}
        summary = score_triples(
            teacher,
            rows,  # type: ignore[arg-type]
            settings.output_dir,
            name=settings.teacher,
            depends={**depends, **({"options": part.lasting} if part.lasting else {})},
            rows_a_shard=settings.rows_a_shard,
            batch_size=settings.batch_size,
            state=job.state,
            write=job.write,
        )
    job.record(settings)
    if job.is_main:
        print(f"\n{table(summary, settings.teacher)}\n\n{Path(settings.output_dir) / 'triples'}", flush=True)
    job.finish()


def table(summary: dict[str, Any], teacher: str) -> str:
    on_top, margin, scores = summary["positive_on_top"], summary["margin"], summary["scores"]
    least, most, mean = (f"{scores[name]:.2f}" for name in ("min", "max", "mean"))
    cells = {
        "teacher": teacher,
        "rows": f"{summary['rows']:,}",
        "candidates a row": f"{summary['candidates']:,}",
        "positive on top": "" if on_top is None else f"{on_top:.1%}",
        "mean margin": "" if margin is None else f"{round(margin, 2) + 0.0:.2f}",
        f"{scores['kind']}, least to most (mean)": f"{least} to {most} ({mean})",
        "shards": f"{summary['shards']:,}",
    }
    return one_row(cells)


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
