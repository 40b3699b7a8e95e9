"""A student as one graph from token ids to its vector, for servers and other runtimes: OpenVINO and ONNX files."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer

from tct_hf.encoding.kinds import read_json
from tct_hf.files import write_json_atomic

Format = Literal["onnx", "openvino"]

# Where sentence-transformers' own backends look for them.
FILES = {"openvino": "openvino/openvino_model.xml", "onnx": "onnx/model.onnx"}
# What the graph leaves to its caller: prompts, lengths and the tokens that fill a query.
ENCODING_FILE = "encoding.json"
_TOKENS = "last_hidden_state"  # the name that sentence-transformers' backends read
_VECTOR = "sentence_embedding"
_TOGETHER = 32  # texts of similar length a pass
_UNCUT = 2**31 - 1  # the length of texts that nothing cuts
# What int8 may lose: lower cosines come from a broken file rather than from rounding.
LOWEST_INT8 = 0.9


class Graph(torch.nn.Module):
    """All modules of a student as a function of tensors: its token vectors, and its vector of each text.

    Raises:
        ValueError: the student doesn't begin with a Transformer, or its prompts, which it leaves out of pooling, have
            different numbers of tokens; or its weights are in half precision.
    """

    def __init__(self, student: SentenceTransformer) -> None:
        super().__init__()
        if not isinstance(student, SentenceTransformer) or not isinstance(student[0], Transformer):
            kind = type(student[0]).__name__ if isinstance(student, SentenceTransformer) else type(student).__name__
            raise ValueError(f"A student that begins with a {kind} has no graph: give one with a Transformer.")
        if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in student.parameters()):
            raise ValueError("The student is in half precision, graphs are not: save `student.float()`, export that.")
        self.student = student.eval()
        self.skipped = _skipped_tokens(student)
        known: Any = student.preprocess(["a"])
        self.inputs = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in known]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(texts, tokens)` each, in the order of `inputs`, to `(texts, tokens, dim)` and `(texts, dim)`."""
        first, *rest = self.student
        features = first(dict(zip(self.inputs, tensors, strict=True)))
        if self.skipped:
            mask = features["attention_mask"]
            features["attention_mask"] = mask * (torch.arange(mask.shape[1]) >= self.skipped)
        for module in rest:
            features = module(features)
        return features["token_embeddings"], features[_VECTOR][..., : self.student.truncate_dim]

    def example(self) -> tuple[torch.Tensor, ...]:
        """Inputs to trace it with, padding among them."""
        features: Any = self.student.preprocess(["a b c d e f g h", "a b"])
        return tuple(features[name] for name in self.inputs)


def _skipped_tokens(student: Any) -> int:
    """Tokens of the prompt, which pooling leaves out; 0 where it takes them in."""
    if all(not isinstance(module, Pooling) or module.include_prompt for module in student):
        return 0
    prompts = [student.prompts.get(side) or "" for side in ("query", "document")]
    query, document = (
        int(student.preprocess(["a"], prompt=prompt).get("prompt_length", 0)) if prompt else 0 for prompt in prompts
    )
    if query != document:
        raise ValueError(
            f"The prompts {prompts[0]!r} and {prompts[1]!r}, which pooling leaves out, have {query} and {document} "
            "tokens: one graph can't serve both. Give prompts of the same length, or pooling that takes them in."
        )
    return query


def needs(package: str) -> Any:
    """An optional package, or what to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(f"This needs {name} ({error}): pip install {name}") from error


@contextmanager
def _traced(graph: Graph) -> Iterator[None]:
    """On the CPU, without the tracers' remarks on transformers' code, and without a word to OpenVINO's makers.

    Masks are of finite numbers where an encoder attends within a window: in one that holds only padding, OpenVINO's
    attention under a boolean mask is NaN.
    """
    encoder: Any = graph.student[0].model
    windowed = "sliding_attention" in (getattr(encoder.config, "layer_types", None) or [])
    before, level = encoder.config._attn_implementation, logging.root.manager.disable
    device = graph.student.device
    # What openvino_telemetry takes for a reason not to send.
    with patch.dict(os.environ, CI="true"), warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            graph.student.to("cpu")
            encoder.set_attn_implementation("eager" if windowed else before)
            yield
        except (IndexError, RuntimeError) as error:
            if "tuple index out of range" not in str(error):
                raise
            fix = "pip install --upgrade transformers"  # its masks in 5.4 to 5.8
            raise RuntimeError(f"transformers {transformers.__version__} can't be traced: {fix}") from error
        finally:
            graph.student.to(device)
            encoder.set_attn_implementation(before)
            logging.disable(level)


@cache
def openvino_core() -> Any:
    """OpenVINO's Core, one for the process.

    Each Core's plugin of the CPU sets a stack for signal handlers and unmaps it at its end; of two that end in the
    order of their making, the second puts the first one's stack back, and the next signal kills the process.
    """
    return needs("openvino").Core()


def openvino_model(student: SentenceTransformer) -> Any:
    """The graph of a student as an `openvino.Model` in memory."""
    openvino, graph = needs("openvino"), Graph(student)
    with _traced(graph):
        # Weights of its own: shared ones would follow the student's training, in part.
        model = openvino.convert_model(graph, example_input=graph.example(), share_weights=False)
    dynamic = openvino.PartialShape([-1, -1])
    for port, name in zip(model.inputs, graph.inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(dynamic)
        port.get_node().set_element_type(openvino.Type.i64)
    for port, name in zip(model.outputs, (_TOKENS, _VECTOR), strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    return model


def export(
    student: SentenceTransformer, folder: str | Path, format: Format = "openvino", *, int8: bool = False
) -> Path:
    """Write a student's graph into its checkpoint, for `SentenceTransformer(folder, backend=...)` and for servers.

    The graph takes `input_ids`, `attention_mask` and, of some encoders, `token_type_ids`, all `(texts, tokens)` int64,
    and gives `sentence_embedding`, `(texts, dim)`: pooled, normalised and scaled, the vector of `encode`; and
    `last_hidden_state`, which sentence-transformers pools itself. What remains for a server is in `encoding.json`
    beside `tokenizer.json`: the prompt of a query and of a passage, the tokens each keeps, and what queries are filled
    with. :func:`tct_hf.validate_checkpoint` compares the vectors of every exported file with the checkpoint's.

    Args:
        student: a student with an encoder.
        folder: the checkpoint that :func:`tct_hf.save_student` wrote of it.
        format: "openvino" (extra: openvino) or "onnx" (extra: onnx).
        int8: write it with 8-bit weights and dynamically quantised activations, beside the one in float32.

    Returns:
        The file, `openvino/openvino_model.xml` or `onnx/model.onnx`; with `int8`, its name ends in `_int8`.

    Raises:
        ValueError: an unknown format, or a student that has no such graph.
        FileNotFoundError: the folder holds no checkpoint.
        ImportError: a package of the extra is missing.
    """
    if format not in FILES:
        raise ValueError(f'format={format!r} is not known: use "onnx" or "openvino".')
    folder = Path(folder)
    read_json(folder / "modules.json", required=True)
    file = folder / FILES[format]
    file.parent.mkdir(exist_ok=True)
    graph = Graph(student)
    target = file.with_stem(f"{file.stem}_int8") if int8 else file
    if format == "openvino":
        model = openvino_model(student)
        if int8:
            with _traced(graph):
                model = needs("nncf").compress_weights(model)
        needs("openvino").save_model(model, target, compress_to_fp16=False)
    else:
        needs("onnx")
        _write_onnx(graph, target)
        if int8:
            quantization = needs("onnxruntime.quantization")
            quantization.quantize_dynamic(target, target, per_channel=True)
    write_json_atomic(folder / ENCODING_FILE, encoding_of(student, graph))
    return target


def _write_onnx(graph: Graph, file: Path) -> None:
    names = [_TOKENS, _VECTOR]
    axes: dict[str, Any] = {name: {0: "texts", 1: "tokens"} for name in (*graph.inputs, _TOKENS)}
    with _traced(graph):
        torch.onnx.export(
            graph,
            graph.example(),
            str(file),
            input_names=graph.inputs,
            output_names=names,
            dynamic_axes={**axes, _VECTOR: {0: "texts"}},
            opset_version=17,
            dynamo=False,
        )


def encoding_of(student: Any, graph: Graph) -> dict[str, Any]:
    """What stands between a text and the graph, JSON-ready."""
    first = student[0]
    expansion = first.query_expansion or {}
    longest = student.max_seq_length
    lengths = {
        "query": expansion.get("length") or first.query_length or longest,
        "document": first.document_length or longest,
    }
    tokenizer = student.tokenizer
    default = student.prompts.get(student.default_prompt_name) or ""
    # Of some tokenizers 10^30, or None.
    sides = {
        side: {"prompt": student.prompts.get(side, default), "length": min(n or _UNCUT, _UNCUT)}
        for side, n in lengths.items()
    }
    if expansion:
        sides["query"] |= {"fill": expansion.get("token") or tokenizer.mask_token, "attend": expansion["attend"]}
    return {
        "inputs": graph.inputs,
        "output": _VECTOR,
        "pad": tokenizer.pad_token,
        "similarity": student.similarity_fn_name,
        **sides,
    }


def exported_files(folder: Path) -> list[Path]:
    """The exported files of a checkpoint."""
    found = [folder / name for name in FILES.values()]
    found += [file.with_stem(f"{file.stem}_int8") for file in found]
    return sorted(file for file in found if file.is_file())


def graph_inputs(
    tokenizer: Tokenizer, encoding: dict[str, Any], side: Literal["query", "document"], multiple: int | None = None
) -> Callable[[Sequence[str]], tuple[dict[str, np.ndarray], bool]]:
    """What makes of texts the tensors `(texts, tokens)` that a graph takes, and tells whether any may have been cut.

    Args:
        tokenizer: the student's, or a copy; its lengths are set.
        encoding: what :func:`export` writes beside the graph.
        side: "query" or "document".
        multiple: what the number of tokens is a multiple of, with padding, or the length.
    """
    way = encoding[side]
    fill = way.get("fill")
    pad = fill or encoding["pad"]
    tokenizer.enable_truncation(way["length"])
    tokenizer.enable_padding(
        pad_id=tokenizer.token_to_id(pad),
        pad_token=pad,
        length=way["length"] if fill else None,
        pad_to_multiple_of=None if fill else multiple,
    )

    def inputs(texts: Sequence[str]) -> tuple[dict[str, np.ndarray], bool]:
        rows = tokenizer.encode_batch([way["prompt"] + text for text in texts])
        columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        found = {name: np.array([getattr(row, columns[name]) for row in rows]) for name in encoding["inputs"]}
        found = {name: rows[:, : way["length"]] for name, rows in found.items()}  # the encoder may read no more
        filled = bool((found["attention_mask"].sum(axis=1) >= way["length"]).any())
        if way.get("attend"):
            found["attention_mask"][:] = 1
        return found, filled

    return inputs


def graph_vectors(file: Path, texts: Sequence[str], side: Literal["query", "document"]) -> np.ndarray:
    """Vectors of texts by an exported file as a server would get them: without torch or sentence-transformers.

    Args:
        file: the exported file, in its checkpoint.
        texts: what to encode.
        side: "query" or "document".

    Returns:
        `(texts, dim)` float32.
    """
    folder = file.parent.parent
    encoding = read_json(folder / ENCODING_FILE, required=True)
    inputs = graph_inputs(Tokenizer.from_file(str(folder / "tokenizer.json")), encoding, side)
    run: Callable[[dict[str, np.ndarray]], np.ndarray]
    if file.suffix == ".onnx":
        session = needs("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
        run = lambda given: session.run([_VECTOR], given)[0]  # noqa: E731
    else:
        compiled = openvino_core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        run = lambda given: compiled(given)[_VECTOR]  # noqa: E731
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    parts = [[texts[row] for row in order[start : start + _TOGETHER]] for start in range(0, len(order), _TOGETHER)]
    return np.concatenate([run(inputs(part)[0]) for part in parts])[np.argsort(order)]


def check_exports(folder: Path, texts: Sequence[str], rule: dict[str, np.ndarray]) -> dict[str, float]:
    """Compare every exported file of a checkpoint with the checkpoint's own vectors of some texts.

    Returns:
        File name to the largest absolute difference; of int8 files, to the lowest cosine.

    Raises:
        ValueError: a file's vectors differ by more than 1e-4, relative to the largest number where that is above 1; of
            an int8 file, a cosine is below 0.9.
        ImportError: the file's runtime is missing.
    """
    found = {}
    for file in exported_files(folder):
        name = file.relative_to(folder).as_posix()
        try:
            vectors = np.concatenate([graph_vectors(file, texts, side) for side in ("query", "document")])
        except (ImportError, FileNotFoundError):
            raise
        except Exception as error:  # onnxruntime's errors have no common class
            raise ValueError(f"{folder}: {name} can't be run ({error}): export it again.") from error
        wanted = np.concatenate([rule["query"], rule["document"]])
        if file.stem.endswith("_int8"):
            lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(wanted, axis=1)
            products, some = (vectors * wanted).sum(axis=1), lengths > 0  # a text without words may have a zero vector
            found[name] = float((products[some] / lengths[some]).min())
            fine = found[name] >= LOWEST_INT8
        else:
            found[name] = float(np.abs(vectors - wanted).max())
            fine = found[name] <= 1e-4 * max(1.0, float(np.abs(wanted).max()))
        if not fine:
            what = "have a cosine of" if file.stem.endswith("_int8") else "differ by"
            raise ValueError(
                f"{folder}: vectors of {name} {what} {found[name]:.3g}, against the checkpoint's: export it again."
            )
    return found
