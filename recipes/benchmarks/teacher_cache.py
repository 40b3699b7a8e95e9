"""What teachers cost: training steps with hard labels alone, and with live, cached and self-coupled teachers.

    python recipes/benchmarks/teacher_cache.py [--steps 20] [--batch 32] [--threads 2]

Same texts, the bundled 6-layer encoder, one trainer, the steps of all sides in turn. Two groups, each against its own
hard labels: the paper's encoding with a ColBERT, live and cached; and the encoder's own encoding with the mixture of
its cached vectors and BM25, and as its own teacher. The cached teachers have met every text of the timed steps once
before: the figures are those of the second epoch on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

from common import begin, clocked, median, quartiles, table
from train_step import MODES, make_step, step_options, triples

GROUPS = (("hard", "tct", "cached"), ("own", "mixture", "self"))


def main() -> None:
    args = step_options(__doc__).parse_args()

    rows = triples(args.batch * args.steps, seed=1)
    begin(args.threads, f"batch {args.batch}")

    def measured() -> Iterator[list[str]]:
        for mode in [args.mode] if args.mode else MODES:
            for group in GROUPS:
                with tempfile.TemporaryDirectory() as folder:
                    steps = {side: make_step(side, mode, rows, args.batch, f"{folder}/{side}") for side in group}
                    for side, step in steps.items():  # an epoch, in which the caches are filled
                        for _ in range(args.steps if side in ("cached", "mixture") else 1):
                            step()
                    times: dict[str, list[tuple[float, float]]] = {side: [] for side in group}
                    for turn in range(args.steps):
                        for side in group[turn % 3 :] + group[: turn % 3]:
                            times[side].append(clocked(steps[side])[1])
                for side in group:
                    ratios = (quartiles(times[side], times[group[0]], clock) for clock in (0, 1))
                    yield [mode, side, f"{median(times[side]):.3f}", *ratios]

    table("mode | side | s/step | of hard labels (quartiles) | of CPU time (quartiles)", measured())


if __name__ == "__main__":
    main()
