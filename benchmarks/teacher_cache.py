"""What a cached teacher costs: a training step with hard labels alone, a live teacher, a cached one, a cached mixture.

    python benchmarks/teacher_cache.py [--steps 20] [--batch 32] [--threads 2]

Same texts, same student (the bundled 6-layer encoder in TCT encoding), one trainer, steps of the four in turn. The
cached teachers have met every text of the timed steps once before: the figures are those of the second epoch on. The
mixture is MaxSim of 384 dimensions a token, the pooled vectors of the encoder, and BM25.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from pathlib import Path

from train_step import MODES, make_step, step_options, triples

SIDES = ("hard", "tct", "cached", "mixture")


def main() -> None:
    args = step_options(__doc__).parse_args()

    import torch

    from tct_hf.quiet import quieten

    quieten()
    torch.set_num_threads(args.threads)
    rows = triples(args.batch * args.steps, seed=1)
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, batch {args.batch}")
    print(
        "| mode | hard labels s/step | live | cached | mixture | live / hard (quartiles) | of CPU time | "
        "cached / hard | of CPU time | mixture / hard | of CPU time | GB |"
    )
    print("|---|---:|---:|---:|---:|---|---|---|---|---|---|---:|")
    for mode in [args.mode] if args.mode else MODES:
        with tempfile.TemporaryDirectory() as folder:
            steps = {side: make_step(side, mode, rows, args.batch, f"{folder}/{side}") for side in SIDES}
            for _ in range(args.steps):  # an epoch, in which the caches are filled
                steps["cached"]()
                steps["mixture"]()
            for side in ("hard", "tct"):
                steps[side]()
            times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}  # wall and CPU seconds
            for turn in range(args.steps):
                for side in SIDES[turn % 4 :] + SIDES[: turn % 4]:
                    begun, work = time.perf_counter(), time.process_time()
                    steps[side]()
                    times[side].append((time.perf_counter() - begun, time.process_time() - work))
            used = sum(file.stat().st_size for file in Path(folder).rglob("*.f16")) / 1e9
        cells = [f"{statistics.median(wall for wall, _ in times[side]):.3f}" for side in SIDES]
        for side in SIDES[1:]:
            for clock in (0, 1):
                low, middle, high = statistics.quantiles(
                    [mine[clock] / hard[clock] for mine, hard in zip(times[side], times["hard"], strict=True)], n=4
                )
                cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        print(f"| {mode} | {' | '.join(cells)} | {used:.2f} |", flush=True)


if __name__ == "__main__":
    main()
