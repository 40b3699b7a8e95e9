"""OpenVINO as what computes a student's vectors, in place of torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from tct_hf.encoding.export import Graph, needs, openvino_model


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


class OpenVINOEngine:
    """A student's graph, compiled once; each of torch's threads computes a pass of its own.

    Args:
        student: a student with an encoder, on the CPU, in float32.
        bf16: compute in bfloat16.

    Raises:
        ValueError: as :class:`tct_hf.encoding.export.Graph`.
        ImportError: OpenVINO is missing.
    """

    def __init__(self, student: SentenceTransformer, *, bf16: bool = False) -> None:
        openvino, threads = needs("openvino"), torch.get_num_threads()
        self._inputs = Graph(student).inputs
        whole = openvino_model(student)
        vectors = openvino.Model([whole.output("sentence_embedding")], whole.get_parameters(), "student")
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
        options |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads}
        self._dim = vectors.output(0).partial_shape[1].get_length()
        self._queue = openvino.AsyncInferQueue(openvino.compile_model(vectors, "CPU", options), threads)
        self._queue.set_callback(lambda request, found: np.copyto(found, request.output_tensors[0].data))

    def __call__(self, features: Mapping[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        """As the student's `forward`; the numbers are there after :meth:`wait`."""
        found = np.empty((len(features["input_ids"]), self._dim), dtype=np.float32)
        self._queue.start_async({name: features[name].numpy() for name in self._inputs}, found)
        return {"sentence_embedding": torch.from_numpy(found)}

    def wait(self) -> None:
        """Wait for all passes."""
        self._queue.wait_all()
