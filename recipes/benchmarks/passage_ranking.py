"""The whole experiment of recipes/msmarco-passage on a sample, twice: once whole, once with a SIGKILL in each step.

    python recipes/benchmarks/passage_ranking.py --source path/to/squad-sent --sample 1000

Files in MS MARCO's formats are made of a BEIR folder: collection.tsv, queries, qrels, triples of texts. Its
train queries become those of train and of the whole of dev, its test queries those of dev.small, DL 2019 and DL 2020
(with lower grades made up). Each step of the second run is killed as soon as it has printed a line that shows work
under way, and started again. Weights, vectors, expansions, triples, runs and figures of both runs are compared byte by
byte, times apart.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

RECIPE = ROOT / "recipes" / "msmarco-passage"
# Of each train query.
TRIPLES = 3
# The names of the first run's steps, and a line of each at which something is done and something is left.
KILLED = {
    "data": "sample:",
    "teacher": "step     9 of",
    "student": "step     9 of",
    "rounds": "round 1: student",
    "expander": "step     9 of",
    "expansion": "passages",
    "index": "passages",
    "report": "search 2 of",
    "index-hn": "passages",
    "report-hn": "time 1 of",
    "release": "checking the vectors",
    "release-hn": "checking the vectors",
}


def write_files(source: Path, folder: Path) -> dict[str, int]:
    """The published files, and how many judged queries each split has."""
    from tct_hf.data.beir import load_beir
    from tests.passage_files import write_passage_files

    corpus, train, of_train = load_beir(source, "train")
    _, test, of_test = load_beir(source, "test")
    row = {name: number for number, name in enumerate(corpus["id"])}
    of = {**of_train, **of_test}
    found = [(text, row[next(iter(of[name]))]) for name, text in train.items()]
    held = [(text, row[next(iter(of[name]))]) for name, text in test.items()]
    parts = {
        "train": found[:-1000],
        "dev": found[-1000:],
        "dev.small": held[:1000],
        "dl19": held[1000:1043],
        "dl20": held[1043:1097],
    }
    if not folder.is_dir():
        write_passage_files(folder, corpus["text"], parts, triples=TRIPLES)
    return {"passages": len(corpus), **{name: len(rows) for name, rows in parts.items()}}


def write_settings(folder: Path, counts: dict[str, int]) -> None:
    """A data.yaml with the counts of these files instead of MS MARCO's."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"train": "train", "tune": "dev", "dev": "dev.small", "dl19": "dl19", "dl20": "dl20"}
    lines = [
        f"extends: {os.path.relpath(RECIPE / 'sample' / 'data.yaml', folder)}",
        f"expected_passages: {counts['passages']}",
        f"expected_triples: {TRIPLES * counts['train']}",
        "splits:",
    ]
    for name, theirs in names.items():
        queries = counts[theirs] + (counts["dev.small"] if theirs == "dev" else 0)
        lines.append(f"  {name}: {{expected_queries: {queries}, expected_qrels: null}}")
    (folder / "data.yaml").write_text("\n".join(lines) + "\n")


def run(work: Path, name: str, sample: int, kill: dict[str, str]) -> float:
    """The experiment in a folder of its own; seconds. Each step of `kill` is killed once at its line."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TCT_HF_CACHE": str(work / f"cache-{name}"), "HF_HUB_OFFLINE": "1"}
    options = ["--files", str(work / "msmarco"), "--sample", str(sample), "--settings", str(work / "settings")]
    told = subprocess.run(
        ["sh", str(RECIPE / "run.sh"), *options],
        env={**env, "LAUNCH": "echo", "PYTHON": "echo"},
        capture_output=True,
        text=True,
        check=True,
    )
    begun = time.monotonic()
    for step, line in zip(KILLED, told.stdout.splitlines(), strict=True):
        print(f"{step}: {line}", flush=True)
        if step in kill:
            words = [sys.executable, "-m", "tests.recipe_worker", kill[step], *shlex.split(line)]
            if subprocess.run(words, env=env, cwd=folder, check=False).returncode != -9:
                raise SystemExit(f"{step}: not killed, the line did not come; choose another in KILLED")
        subprocess.run([sys.executable, *shlex.split(line)], env=env, cwd=folder, check=True)
    return time.monotonic() - begun


def results(folder: Path) -> dict[str, object]:
    """What must not depend on how the steps went: weights, vectors, triples, runs, figures; not what is timed."""
    kinds = [
        "*.trec",
        "model.safetensors",
        "triples.*",
        "metrics.json",
        "*.jsonl",
        "*.npy",
        "*.parquet",
        "counts.json",
    ]
    files = [file for kind in kinds for file in folder.rglob(kind)]
    found: dict[str, object] = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    for file in folder.rglob("report.json"):
        found[str(file.relative_to(folder))] = without_times(json.loads(file.read_text()))
    return found


def without_times(value: object) -> object:
    timed = re.compile("second|latency|throughput|_ms|per_s|timed|time|load_average|notes|environment|date")
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not timed.search(key)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="BEIR folder with train and test")
    parser.add_argument("--sample", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path("outputs/passage_ranking"))
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    counts = write_files(arguments.source.resolve(), work / "msmarco")
    write_settings(work / "settings", counts)
    seconds = {name: run(work, name, arguments.sample, kill) for name, kill in (("whole", {}), ("killed", KILLED))}
    first, second = (results(work / name / "outputs") for name in ("whole", "killed"))
    differing = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
    print("\n| run | s |\n|---|---|\n" + "\n".join(f"| {name} | {one:.0f} |" for name, one in seconds.items()))
    print(f"\n{len(first)} results compared, {len(differing)} differ: {', '.join(differing) or 'none'}")
    raise SystemExit(1 if differing or not first else 0)


if __name__ == "__main__":
    main()
