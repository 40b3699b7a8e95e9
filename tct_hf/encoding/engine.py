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

# A question's number of tokens is brought to a multiple of the first; up to the second, each has a graph of its own.
# In a dynamic one, another shape than the last question's takes a millisecond: a quarter, for a 6-layer MiniLM.
_MULTIPLE, _LONGEST = 8, 40


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


class OpenVINOEngine:
    """A student's graph, made once and compiled, on as many threads as torch has then.

    Args:
        student: a student with an encoder, on the CPU; brought to float32 as by `encode_texts`.
        bf16: compute in bfloat16.
        low_latency: all threads compute one pass, instead of each one of its own; not for several threads at once.
            Questions of up to 40 tokens have a graph for each multiple of 8, compiled when the first one comes: a copy
            of the weights each, and more for the buffers (34 MB of a 6-layer MiniLM in bfloat16).

    Raises:
        ValueError: as :class:`tct_hf.encoding.export.Graph`.
        ImportError: OpenVINO is missing.
    """

    def __init__(self, student: SentenceTransformer, *, bf16: bool = False, low_latency: bool = False) -> None:
        openvino, self._threads, self._low_latency = needs("openvino"), torch.get_num_threads(), low_latency
        unpack_half(student)
        graph = Graph(student)
        self._inputs = graph.inputs
        whole = openvino_model(student)
        self._model = openvino.Model([whole.output("sentence_embedding")], whole.get_parameters(), "student")
        self._dim = self._model.output(0).partial_shape[1].get_length()
        own = getattr(student.tokenizer, "backend_tokenizer", None) if low_latency else None
        tokenizer = own and Tokenizer.from_str(own.to_str())
        self._rows = tokenizer and graph_inputs(tokenizer, encoding_of(student, graph), "query", _MULTIPLE)
        self.compile(bf16=bf16)

    def compile(self, *, bf16: bool) -> None:
        """Compile the graph that is there already, to compute in bfloat16 or in float32."""
        streams = 1 if self._low_latency else self._threads
        options = {"INFERENCE_NUM_THREADS": self._threads, "NUM_STREAMS": streams}
        self._options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32", **options}
        compiled = openvino_core().compile_model(self._model, "CPU", self._options)
        self._request: Any = compiled.create_infer_request() if self._low_latency else None
        self._fixed: dict[int, Any] = {}
        self._queue = needs("openvino").AsyncInferQueue(compiled, self._threads)
        self._queue.set_callback(lambda request, found: np.copyto(found, request.output_tensors[0].data))

    def __call__(self, features: Mapping[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        """As the student's `forward`; the numbers are there after :meth:`wait`."""
        inputs = {name: features[name].numpy() for name in self._inputs}
        if self._request is not None:  # the way through another thread takes time
            return {"sentence_embedding": torch.from_numpy(self._request.infer(inputs, share_inputs=True)[0])}
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
        if filled:
            return None
        width = inputs["input_ids"].shape[1]
        request = self._request if width > _LONGEST else self._fixed.get(width) or self._of_width(width)
        return request.infer(inputs, share_inputs=True)[0]

    def _of_width(self, width: int) -> Any:
        model = self._model.clone()  # weights in float32 are shared
        model.reshape({port.any_name: [1, width] for port in model.inputs})
        self._fixed[width] = openvino_core().compile_model(model, "CPU", self._options).create_infer_request()
        return self._fixed[width]

    def wait(self) -> None:
        """Wait for all passes."""
        self._queue.wait_all()
