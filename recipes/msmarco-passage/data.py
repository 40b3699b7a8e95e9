"""Turn the files of MS MARCO's passage ranking task, or Hub data sets, into a BEIR folder; checked by count.

python recipes/msmarco-passage/data.py recipes/msmarco-passage/data.yaml [--files FOLDER] [--sample N]

No file takes its name before it is whole. Stopped at any point, the same command begins again; done, it does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from tct_hf.pipeline.passage_ranking import PassageRankingFiles
from tct_hf.settings import SettingsError, run_recipe, save_resolved, setting


@dataclass
class Settings(PassageRankingFiles):
    output_dir: str = setting("outputs/data", "where the BEIR folder is written")
    sample: int | None = setting(None, "keep so many passages: judged ones of a part of the queries, then others")


def main(settings: Settings) -> None:
    from tct_hf.pipeline.passage_ranking import prepare_passage_ranking

    if settings.sample is not None and settings.sample < 1:
        raise SettingsError(f"sample: {settings.sample} is below 1; leave it out for all passages")
    source = PassageRankingFiles(**{one.name: getattr(settings, one.name) for one in fields(PassageRankingFiles)})
    counts = prepare_passage_ranking(source, settings.output_dir, sample=settings.sample)
    save_resolved(settings, settings.output_dir, extra={})
    print(f"\n{table(counts)}\n\n{settings.output_dir}", flush=True)


def table(counts: dict[str, Any]) -> str:
    rows = [("passages", f"{counts['passages']:,}", "")]
    rows += [(name, f"{one['queries']:,}", f"{one['judgements']:,}") for name, one in counts["splits"].items()]
    return "\n".join(["| | count | judgements |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
