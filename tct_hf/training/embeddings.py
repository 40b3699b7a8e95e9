"""Embedding distillation: how far a student's vectors are from its teacher's, whose dimensions may be others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from tct_hf.training.score_losses import Distance, at_least_float32

PROJECTIONS_FILE = "projections.pt"  # of a checkpoint, to go on from


def embedding_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], distance: Distance = "cosine") -> Tensor:
    """`()`, how far a student's vectors are from its teacher's: half the mean over queries, half that over passages.

    Both sides weigh the same, however many passages a query has: where the queries of one model search the passages
    of the other, that side must be right.

    Args:
        student: `(queries, dim)` of the queries, then of each candidate column.
        teacher: the same; of the queries alone where these alone are learned, which then have all the weight.
        distance: "cosine", 1 - cosine; or "squared", the squared Euclidean distance, a sum over dimensions.

    Source: Vujanic and Rueckstiess, arXiv 2509.12539 (LEAF).
    """
    rows = []
    for own, told in zip(map(at_least_float32, student), teacher, strict=False):
        told = told.to(own.dtype)
        cosine = distance == "cosine"
        rows.append(1.0 - torch.cosine_similarity(own, told, dim=1) if cosine else (own - told).square().sum(1))
    sides = [rows[0].mean(), *([torch.cat(rows[1:]).mean()] if rows[1:] else [])]
    return torch.stack(sides).mean()


class Projection(nn.Linear):
    """A learned linear map of a student's vectors to its teacher's dimensions, orthogonal at first."""

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__(student_dim, teacher_dim, bias=False)
        # The same in every process.
        nn.init.orthogonal_(self.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            vectors = at_least_float32(embeddings)
            return nn.functional.linear(vectors, self.weight.to(vectors.dtype))


class EmbeddingTrainer(Trainer):
    """A part of a trainer: projections learn the same in all processes, and are kept with its checkpoints."""

    teacher: Any
    loss: Any

    @property
    def projections(self) -> list[Projection]:
        """Those of all losses."""
        losses = self.loss.values() if isinstance(self.loss, dict) else [self.loss]
        return [module for loss in losses for module in loss.modules() if isinstance(module, Projection)]

    def learn_embeddings(self) -> None:
        """Get losses ready for the teacher's vectors; refuses a teacher that has none."""
        for loss in self.loss.values() if isinstance(self.loss, dict) else [self.loss]:
            if weight := getattr(loss, "embedding_weight", 0.0):
                if self.teacher.embedding_dim is None:
                    raise ValueError(
                        f"embedding_weight is {weight}, but a {type(self.teacher).__name__} has no vectors of texts: "
                        "teach with a DenseTeacher, or an ensemble that has one, or set embedding_weight to 0."
                    )
                loss.project_to(self.teacher.embedding_dim)
        self.add_callback(_AverageGradients(self.projections))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.projections and self.args.should_save:
            torch.save([one.state_dict() for one in self.projections], Path(output_dir, PROJECTIONS_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        file = None if checkpoint is None else Path(checkpoint, PROJECTIONS_FILE)
        if file is not None and file.is_file() != bool(self.projections):
            has = "has a projection, and this run none" if file.is_file() else "has no projection for this run"
            raise ValueError(
                f"{checkpoint} {has}: resume with the embedding_weight and teacher it was made with (and without "
                "save_only_model), or train its model in another folder."
            )
        super()._load_optimizer_and_scheduler(checkpoint)
        if file is not None and self.projections:
            kept = torch.load(file, map_location="cpu", weights_only=True)
            for one, weights in zip(self.projections, kept, strict=True):
                one.load_state_dict(weights)


class _AverageGradients(TrainerCallback):
    """Averages the gradients of projections over the processes: a wrapper of the model does not see them."""

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.projections = projections

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for one in self.projections if get_world_size() > 1 else ():
            if one.weight.grad is None:  # another data set's batch
                one.weight.grad = torch.zeros_like(one.weight)
            dist.all_reduce(one.weight.grad)
            one.weight.grad /= get_world_size()
