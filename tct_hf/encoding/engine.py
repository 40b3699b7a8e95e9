"""OpenVINO as what computes a student's vectors, in place of torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from tct_hf.encoding.export import Graph, encoding_of, graph_inputs, needs, openvino_core, openvino_model
from tct_hf.encoding.weights import unpack_half

# Tokens of which the width of a pass with low latency is a multiple.
_WIDTH = 8


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


class OpenVINOEngine:
    """A student's graph, compiled once, on as many threads as torch has then.

    Args:
        student: a student with an encoder, on the CPU; brought to float32 as by `encode_texts`.
        bf16: compute in bfloat16.
        low_latency: all threads compute one pass, instead of each one of its own; not for several threads at once.

    Raises:
        ValueError: as :class:`tct_hf.encoding.export.Graph`.
        ImportError: OpenVINO is missing.
    """

    def __init__(self, student: SentenceTransformer, *, bf16: bool = False, low_latency: bool = False) -> None:
        openvino, threads = needs("openvino"), torch.get_num_threads()
        unpack_half(student)
        graph = Graph(student)
        self._inputs = graph.inputs
        whole = openvino_model(student)
        vectors = openvino.Model([whole.output("sentence_embedding")], whole.get_parameters(), "student")
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
        options |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1 if low_latency else threads}
        self._dim = vectors.output(0).partial_shape[1].get_length()
        compiled = openvino_core().compile_model(vectors, "CPU", options)
        self._request: Any = compiled.create_infer_request() if low_latency else None
        own = getattr(student.tokenizer, "backend_tokenizer", None) if low_latency else None
        tokenizer = own and Tokenizer.from_str(own.to_str())
        self._rows = tokenizer and graph_inputs(tokenizer, encoding_of(student, graph), "query", _WIDTH)
        self._queue = openvino.AsyncInferQueue(compiled, threads)
        self._queue.set_callback(lambda request, found: np.copyto(found, request.output_tensors[0].data))

    def __call__(self, features: Mapping[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        """As the student's `forward`; the numbers are there after :meth:`wait`."""
        inputs = {name: features[name].numpy() for name in self._inputs}
        if self._request is not None:
            # Each new shape takes time, and so does the way through another thread: a quarter of a short question's.
            padding = ((0, 0), (0, -features["input_ids"].shape[1] % _WIDTH))
            inputs = {name: np.pad(tensor, padding) for name, tensor in inputs.items()}
            return {"sentence_embedding": torch.from_numpy(self._infer(inputs))}
        found = np.empty((len(features["input_ids"]), self._dim), dtype=np.float32)
        self._queue.start_async(inputs, found)
        return {"sentence_embedding": torch.from_numpy(found)}

    def question(self, text: str) -> np.ndarray | None:
        """`(1, dim)` of a query with low latency, by less Python than the general way.

        None where that has something to say, since the query may be cut, and where the tokenizer is not a fast one.
        """
        if self._request is None or self._rows is None:
            return None
        inputs, filled = self._rows([text])
        return None if filled else self._infer(inputs)

    def _infer(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        return self._request.infer(inputs, share_inputs=True)[0]

    def wait(self) -> None:
        """Wait for all passes."""
        self._queue.wait_all()
