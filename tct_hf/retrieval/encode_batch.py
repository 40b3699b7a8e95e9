"""A student as a function of batches of passages, for frameworks that share out the work themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tct_hf.encoding.convert import load_encoder
from tct_hf.hub_client import resolve_model
from tct_hf.retrieval.encode import encode_texts, is_sparse_encoder
from tct_hf.retrieval.vectors import finite_rows


class EncodeBatch:
    """Encodes batches of passages with a dense student: a callable class for `map_batches` of Ray Data.

    Each actor loads the model once.

    Args:
        model: folder or Hub id of a student, or a bundled model; on each node.
        device: the device that encodes; the GPU that Ray lends the actor, or the CPU, when None.
        bf16: compute in bfloat16 instead of float32; not decided by the batches, whose vectors would then differ.
        tokens_per_pass: as `encode_corpus`.
        truncate_dim: number of first dimensions to keep; all when None.

    Raises:
        ValueError: a model of sparse vectors, or of a vector a token.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        bf16: bool = False,
        tokens_per_pass: int | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        self._name, self._model = model, load_encoder(resolve_model(model), device=device)
        if is_sparse_encoder(self._model):
            raise ValueError(f"{model}: a model of sparse vectors, which a column can't hold; use encode_corpus")
        if truncate_dim is not None:
            self._model.truncate_dim = truncate_dim
        self._options: dict[str, Any] = {"bf16": bf16, "tokens_per_pass": tokens_per_pass}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Encode a batch.

        Args:
            batch: its columns, of which "id" and "text" are read.

        Returns:
            "id", and "vector", `(passages, dim)` float32: what `encode_document` gives for these texts.

        Raises:
            ValueError: a column is missing, or a passage has a NaN vector, naming it.
        """
        if absent := [name for name in ("id", "text") if name not in batch]:
            raise ValueError(f"batch: no column {absent[0]!r} among {', '.join(batch)}; rename_columns makes one")
        vectors = encode_texts(self._model, list(batch["text"]), task="document", **self._options)
        finite = finite_rows(vectors)
        if not finite.all():
            name = str(batch["id"][int(finite.argmin())])
            raise ValueError(f"batch: passage {name!r} has a NaN or infinite vector ({self._name}); check the weights")
        return {"id": np.asarray(batch["id"]), "vector": vectors}
