"""What keeps a sparse student sparse, and what notices when it is about to be empty."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import FlopsLoss, SpladeLoss
from torch import Tensor

from tct_hf.batches import gather_rows, sizes_of_all
from tct_hf.training.score_losses import at_least_float32


def active_dims(embeddings: Tensor) -> Tensor:
    """`()` float32, the mean number of dimensions other than 0 of `(texts, dimensions)`."""
    return (embeddings.detach() != 0).sum(dim=1).float().mean()


class FlopsOfAllDevices(FlopsLoss):
    """FLOPS of the whole batch, however many devices it lies on: the sum over dimensions of the squared mean weight.

    sentence-transformers' own takes the mean over a device's rows: with several devices that is another regulariser,
    and in half precision it would be rounded to 3 digits.

    Source: Paria et al., arXiv 2004.05665, section 4; threshold: arXiv 2504.14839.
    """

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """FLOPS of `(texts, dimensions)` of this device together with the other devices', `()`."""
        with torch.autocast(embeddings.device.type, enabled=False):
            weights = at_least_float32(embeddings)
            if self.threshold is not None:
                dense = (embeddings != 0).sum(dim=1, keepdim=True) > self.threshold
                weights = weights.masked_fill(~dense, 0.0)
            sizes = sizes_of_all(len(weights), weights.device)
            sums = gather_rows(weights.sum(dim=0, keepdim=True), [1] * len(sizes), with_grad=True)
            return (sums.sum(dim=0) / sum(sizes)).square().sum()


class RegularizerWarmup(SpladeRegularizerWeightSchedulerCallback):
    """sentence-transformers' warm-up of the regularisers' weights, over a share of the steps or a number of them.

    The weights depend on the step alone, so that a run that resumes goes on where it was.
    """

    def __init__(self, loss: SpladeLoss, *, warmup: float, shape: str) -> None:
        super().__init__(loss, shape, warmup_ratio=warmup if 0.0 < warmup < 1.0 else 1.0)
        self.fixed_steps = None if 0.0 < warmup < 1.0 else int(warmup)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.fixed_steps is not None:
            self.warmup_steps: Any = self.fixed_steps


class CollapsedStudent(ValueError):
    """A sparse student's vectors have lost, or are about to lose, all active dimensions; they do not come back."""


class CollapseWatch:
    """Raises when the active dimensions of queries or passages are gone, or will be within a few steps.

    A vector of zeros has no gradient: once a student is empty it stays empty, and its loss is a constant. Sparse
    training that goes well also begins with a fall, to a level where the regulariser and the loss are even; so a fall
    counts only where it leads, at the pace of the last steps, below one dimension soon, several steps in a row.
    """

    def __init__(self, *, window: int = 5, horizon: int = 5, patience: int = 3) -> None:
        self.window, self.horizon, self.patience = window, horizon, patience
        self._seen: dict[str, deque[float]] = {}
        self._bad: dict[str, int] = {}

    def step(self, dims: Mapping[str, float], settings: Mapping[str, Any]) -> None:
        """Take in one step."""
        for what, value in dims.items():
            seen = self._seen.setdefault(what, deque(maxlen=self.window))
            seen.append(value)
            self._bad[what] = self._bad.get(what, 0) + 1 if self._steps_left(list(seen)) <= self.horizon else 0
            if self._bad[what] >= self.patience:
                raise CollapsedStudent(
                    f"The student's {what} are heading for zero active dimensions: "
                    f"{', '.join(f'{one:.4g}' for one in seen)} on average in the last steps, and vectors of zeros "
                    "have no gradient. Start again with a higher temperature and student_temperature, a lower "
                    "regularizer weight, a longer regularizer_warmup or a lower learning_rate; now "
                    f"{', '.join(f'{name}={setting}' for name, setting in settings.items())}."
                )

    @staticmethod
    def _steps_left(seen: list[float]) -> float:
        """Steps until the mean is below 1, at the pace of an exponential through the window's values."""
        if seen[-1] < 1.0:
            return 0.0
        if len(seen) < 3:
            return math.inf
        logs = np.log(np.maximum(seen, 1e-3))
        pace = float(np.polyfit(range(len(logs)), logs, 1)[0])  # least squares
        return float(logs[-1]) / -pace if pace < 0 else math.inf
