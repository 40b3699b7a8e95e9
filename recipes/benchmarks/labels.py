"""What distillation adds to labels: all of them, a part, or none, against labels alone on the same steps and batches.

    python recipes/benchmarks/labels.py --source builtin --labels 0.25 0.1 --seeds 13 14 15

Every student is recipes/train.py's with the settings of recipes/quickstart.yaml: labels alone is
sentence-transformers with MultipleNegativesRankingLoss on the judged questions; distilled takes the other questions
too, with the mixture's best passage as pseudo-positive. `--questions 250 500` adds students without labels that learn
from so many questions. Stopped at any point, the same command goes on; results are the test split's, and p values of
paired randomisation tests, each query's figure averaged over the seeds, Holm-corrected over the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEASURES = ["RR@10", "nDCG@10", "R@100"]


def train(folder: Path, stage: str, settings: dict[str, Any]) -> Path:
    words = [f"--{key}={value}" for key, value in {**settings, "output_dir": folder, "stages": f"[{stage}]"}.items()]
    recipe = [str(ROOT / "recipes" / "train.py"), str(ROOT / "recipes" / "quickstart.yaml")]
    subprocess.run([sys.executable, *recipe, *words], check=True)
    return folder / stage


def measure(model: Path | str, collection: Any, saved: Path) -> dict[str, list[float]]:
    """Figures of each test query, exact search."""
    from sentence_transformers import SentenceTransformer

    from tct_hf import DenseTeacher, evaluate_run
    from tct_hf.mixture import by_cosine, dense_run

    if not saved.is_file():
        teacher = DenseTeacher(by_cosine(SentenceTransformer(str(model))))
        test = collection.splits["test"]
        run = dense_run(teacher, collection.corpus["id"][:], collection.corpus["text"][:], test.queries, 100)
        found = evaluate_run(run, test.qrels, MEASURES).per_query
        saved.write_text(json.dumps({name: list(values.values()) for name, values in found.items()}))
    return json.loads(saved.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="builtin", help="BEIR folder, Hub id or builtin")
    parser.add_argument("--labels", type=float, nargs="*", default=[0.25, 0.1], help="shares of the train questions")
    parser.add_argument("--questions", type=int, nargs="*", default=[], help="questions of students without labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[13])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/labels"))
    parser.add_argument("--set", nargs="*", default=[], help="further settings, such as data.dev_share=0.15")
    args = parser.parse_args()

    from tct_hf.evaluation.significance import holm, paired_randomisation_test
    from tct_hf.pipeline.data import read_collection
    from tct_hf.pipeline.settings import DataSettings
    from tct_hf.progress import quieten

    quieten()
    extra: dict[str, Any] = dict(one.split("=", 1) for one in args.set)
    data = {name.removeprefix("data."): float(value) for name, value in extra.items() if name.startswith("data.")}
    counts = {name: int(value) if name.startswith("max_") else value for name, value in data.items()}
    collection = read_collection(DataSettings(source=args.source, **counts), train=False)
    extra |= {"data.source": args.source, "student.teacher_cache": args.output_dir / "vectors"}

    def student(name: str, stage: str, seed: int, settings: dict[str, Any]) -> dict[str, list[float]]:
        folder = args.output_dir / name.replace(" ", "-") / f"seed-{seed}"
        path = train(folder, stage, {**extra, "seed": seed, **settings}) if not (folder / stage).is_dir() else folder
        found = measure(path, collection, folder / f"{stage}.json")
        print(f"{name}, {stage}, seed {seed}: {shown(found)}", flush=True)
        return found

    args.output_dir.mkdir(parents=True, exist_ok=True)
    table: dict[str, dict[str, list[dict[str, list[float]]]]] = {}
    for seed in args.seeds:
        for share in args.labels:
            cell = table.setdefault(f"labels {share:g}", {"stock": [], "student": []})
            settings = {"data.labels": share, "data.unlabelled": str(share < 1).lower()}
            for stage, found in cell.items():
                found.append(student(f"labels {share:g}", stage, seed, settings))
        for count in args.questions:
            settings = {"data.labels": 0.0, "data.unlabelled": "true", "data.max_questions": count}
            student(f"questions {count}", "student", seed, settings)
    tests, gains = [], []
    for cell in table.values():
        alone, distilled = (averaged(cell[stage], "nDCG@10") for stage in ("stock", "student"))
        gains.append(sum(distilled) / len(distilled) - sum(alone) / len(alone))
        tests.append(paired_randomisation_test(distilled, alone))
    for name, gain, p in zip(table, gains, holm(tests), strict=True):
        print(f"{name}: distilled {gain:+.3f} nDCG@10 against labels alone, p {p:.3f}")


def averaged(seeds: list[dict[str, list[float]]], name: str) -> list[float]:
    return [sum(values) / len(values) for values in zip(*(one[name] for one in seeds), strict=True)]


def shown(found: dict[str, list[float]]) -> str:
    return " / ".join(f"{sum(values) / len(values):.3f}" for values in found.values())


if __name__ == "__main__":
    main()
