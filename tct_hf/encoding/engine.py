"""OpenVINO as what computes a student's vectors, in place of torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from threading import Lock
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from tct_hf.encoding.export import Graph, encoding_of, graph_inputs, needs, openvino_core, openvino_model
from tct_hf.encoding.weights import unpack_half

# Short questions are padded to one of some widths, each of which has a graph. One graph of all widths takes a
# millisecond more where the last question's was another: a quarter of the time of a 6-layer MiniLM, but little of that
# of a large model, whose weights would be in memory several times.
_WIDTH_STEP, _LARGEST_WIDTH, _SMALL_MODEL = 8, 40, 50_000_000


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


class OpenVINOEngine:
    """A student's graph, made once and compiled, on as many threads as torch has then.

    Args:
        student: a student with an encoder, on the CPU; brought to float32 as by `encode_texts`.
        bf16: compute in bfloat16.
        low_latency: all threads compute one pass, instead of each one of its own; callers of several threads take
            turns. Of a model of up to 50 million weights, questions of up to 40 tokens have a graph for each multiple
            of 8; each takes 0.3 s and 30 MB for a 6-layer MiniLM in bfloat16.

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
        encoding = encoding_of(student, graph)
        self._rows = tokenizer and graph_inputs(tokenizer, encoding, "query", _WIDTH_STEP)
        small = sum(weight.numel() for weight in student.parameters()) <= _SMALL_MODEL
        length, fill = encoding["query"]["length"], encoding["query"].get("fill")
        widths = {length if fill else min(at, length) for at in range(_WIDTH_STEP, _LARGEST_WIDTH + 1, _WIDTH_STEP)}
        self._widths = [width for width in widths if self._rows and small and width <= _LARGEST_WIDTH]
        self._lock = Lock()
        self.compile(bf16=bf16)

    def compile(self, *, bf16: bool) -> None:
        """Compile the graph that is there already, to compute in bfloat16 or in float32."""
        streams = 1 if self._low_latency else self._threads
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": self._threads, "NUM_STREAMS": streams}
        options["INFERENCE_PRECISION_HINT"] = "bf16" if bf16 else "f32"
        compiled = openvino_core().compile_model(self._model, "CPU", options)
        self._request: Any = compiled.create_infer_request() if self._low_latency else None
        self._of_width: dict[int, Any] = {}
        for width in self._widths:
            model = self._model.clone()  # weights in float32 are shared
            model.reshape({port.any_name: [1, width] for port in model.inputs})
            self._of_width[width] = openvino_core().compile_model(model, "CPU", options).create_infer_request()
        self._queue = needs("openvino").AsyncInferQueue(compiled, self._threads)
        self._queue.set_callback(lambda request, found: np.copyto(found, request.output_tensors[0].data))

    def __call__(self, features: Mapping[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        """As the student's `forward`; the numbers are there after :meth:`wait`."""
        inputs = {name: features[name].numpy() for name in self._inputs}
        if self._request is not None:  # the way through another thread takes time
            return {"sentence_embedding": torch.from_numpy(self._infer(self._request, inputs))}
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
        return self._infer(self._of_width.get(inputs["input_ids"].shape[1], self._request), inputs)

    def _infer(self, request: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
        with self._lock:
            return request.infer(inputs, share_inputs=True)[0]

    def wait(self) -> None:
        """Wait for all passes."""
        self._queue.wait_all()
