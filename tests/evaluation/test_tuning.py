"""Weights of fused pairs as they are shown."""

from __future__ import annotations

import pytest

from tct_hf.evaluation.tuning import weight_text


@pytest.mark.parametrize(
    ("alpha", "text"),
    [(0.0, "0"), (0.26149, "0.261"), (3.541, "3.54"), (999.4, "999"), (999.7, "1,000"), (3094.2, "3,094")],
)
def test_a_weight_is_never_a_power_of_ten(alpha: float, text: str) -> None:
    assert weight_text(alpha) == text
