"""The vectors of a teacher's queries alone: those of passages stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tct_hf.teachers.base import Columns, NoTeacher, Rows, Texts
from tct_hf.teachers.cached import CachedTeacher
from tct_hf.teachers.colbert import DenseTeacher


class QueryVectors(NoTeacher):
    """Teaches a query tower the vectors of an embedding model's queries; no scores, and no passage is encoded.

    First in a :class:`TeacherEnsemble`, with the weight 0, it stands beside the teachers of scores.

    Args:
        teacher: the model that encoded the passages.
    """

    def __init__(self, teacher: DenseTeacher | CachedTeacher) -> None:
        self.members, self._teacher = [teacher], teacher

    def collate(self, queries: Texts, columns: Columns, rows: Rows) -> dict[str, Any]:
        return {**super().collate(queries, columns, rows), "asked": list(queries)}

    def score_and_embed(self, inputs: Mapping[str, Any], *, gather: bool) -> tuple[Tensor, list[Tensor] | None]:
        vectors = np.concatenate(self._teacher.vectors(inputs["asked"], "query"))  # (queries, dim)
        return self.score_matrix(inputs, gather=gather), [torch.from_numpy(vectors).to(self.device, torch.float32)]
