"""What teachers cost: training steps with hard labels alone, and with live, cached and self-coupled teachers.

    python recipes/benchmarks/teacher_cache.py [--steps 20] [--batch 32] [--threads 2]

Same texts, the bundled 6-layer encoder, one trainer, the steps of all sides in turn. Two groups, each against its own
hard labels: the paper's encoding with a ColBERT, live and cached; and the encoder's own encoding with the mixture of
its cached vectors and BM25, and as its own teacher. The cached teachers have met every text of the timed steps once
before: the figures are those of the second epoch on.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time

from train_step import MODES, make_step, step_options, triples

GROUPS = (("hard", "tct", "cached"), ("own", "mixture", "self"))


def main() -> None:
    args = step_options(__doc__).parse_args()

    import torch

    from tct_hf.progress import quieten

    quieten()
    torch.set_num_threads(args.threads)
    rows = triples(args.batch * args.steps, seed=1)
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, batch {args.batch}")
    print("| mode | side | s/step | of hard labels (quartiles) | of CPU time (quartiles) |")
    print("|---|---|---:|---|---|")
    for mode in [args.mode] if args.mode else MODES:
        for group in GROUPS:
            with tempfile.TemporaryDirectory() as folder:
                steps = {side: make_step(side, mode, rows, args.batch, f"{folder}/{side}") for side in group}
                for _ in range(args.steps):  # an epoch, in which the caches are filled
                    for side in {"cached", "mixture"} & {*group}:
                        steps[side]()
                for side in {*group} - {"cached", "mixture"}:
                    steps[side]()
                times: dict[str, list[tuple[float, float]]] = {side: [] for side in group}  # wall and CPU seconds
                for turn in range(args.steps):
                    for side in group[turn % 3 :] + group[: turn % 3]:
                        begun, work = time.perf_counter(), time.process_time()
                        steps[side]()
                        times[side].append((time.perf_counter() - begun, time.process_time() - work))
            for side in group:
                cells = [f"{statistics.median(wall for wall, _ in times[side]):.3f}"]
                for clock in (0, 1):
                    low, middle, high = statistics.quantiles(
                        [mine[clock] / hard[clock] for mine, hard in zip(times[side], times[group[0]], strict=True)],
                        n=4,
                    )
                    cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
                print(f"| {mode} | {side} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
