"""The figures that a recipe is expected to give, and their comparison with those that a run measured."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tct_hf.evaluation.tables import markdown_table
from tct_hf.files import MADE_AGAIN, read_json
from tct_hf.settings import SettingsError, setting


@dataclass
class ExpectedSettings:
    """Figures to expect, which --verify compares with those of the report."""

    source: str = setting("", "where the figures come from")
    tolerance: float = setting(0.01, "largest difference allowed, where a system has no tolerance of its own")
    figures: dict[str, dict[str, dict[str, float]]] = setting(
        {}, "split to key of a system to means, such as {test: {bm25: {RR@10: 0.503, tolerance: 0.002}}}"
    )

    def check(self) -> None:
        """Refuse to verify a recipe that says nothing of what to expect."""
        if not self.figures:
            raise SettingsError("verify: no figure is expected of this recipe; write some under expected.figures")

    def table(self, measured: Mapping[str, Any]) -> tuple[str, int]:
        """Every figure beside what was measured, as a Markdown table, and how many are off or not there.

        Args:
            measured: as of :func:`measured_in`.
        """
        rows, off = [["split", "system", "measure", "expected", "tolerance", "measured", "ok"]], 0
        for split, systems in self.figures.items():
            for key, means in systems.items():
                tolerance = means.get("tolerance", self.tolerance)
                for measure in (name for name in means if name != "tolerance"):
                    found = measured.get(split, {}).get(key, {}).get(measure, {}).get("mean")
                    ok = found is not None and abs(found - means[measure]) <= tolerance + 1e-9
                    off += not ok
                    shown = "not reported" if found is None else f"{found:.4f}"
                    figures = [f"{means[measure]:.4f}", f"{tolerance:g}", shown, "yes" if ok else "no"]
                    rows.append([split, key, measure, *figures])
        return markdown_table(rows, left=3), off

    def verify(self, file: Path) -> None:
        """Print the table of a report.json or metrics.json; a figure that is off ends the process with status 1."""
        table, off = self.table(measured_in(file))
        print(f"\nExpected: {self.source or 'figures of this recipe'}\n\n{table}", flush=True)
        if off:
            print(f"verify: {off} {'figure is' if off == 1 else 'figures are'} off", file=sys.stderr)
            raise SystemExit(1)


def measured_in(file: Path) -> dict[str, Any]:
    """Split to key of a system to measure to its "mean", of a report.json or metrics.json."""
    content = read_json(file, MADE_AGAIN)
    if "measured" in content:
        return dict(content["measured"])
    own = {system["key"]: system["effectiveness"] for system in content["systems"]}
    also = {
        name: {key: system["effectiveness"] for key, system in split["systems"].items()}
        for name, split in content["also"].items()
    }
    return {content["collection"]["split"]: own, **also}
