"""What training tests share: a tiny student and teacher, triples, a trainer, an independent loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from tests.models import tiny_bert, tiny_colbert, tiny_cross_encoder, tiny_mlm, tiny_modernbert

EVERY_STEP: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}

PASSAGES = [
    "a passage of dense retrieval and the teacher",
    "the student is distilled from a teacher of tokens",
    "query representations of the passage",
    "what is a dense representation",
    "distillation of tokens: a passage, a query, the teacher and more words than the others have",
    "retrieval",
    "the teacher is dense",
    "a student of representations",
]
QUERIES = [
    "what is dense retrieval",
    "the student",
    "query tokens",
    "distillation",
    "a teacher of dense passages",
    "representations of what",
    "tokens",
    "the passage",
]


def triples(rows: int = 16, *, ids: bool = True, negatives: int = 1) -> Dataset:
    """Rows with repeated passages and, for every third query, a second known positive that is in the batch."""
    names = ["negative"] if negatives == 1 else [f"negative_{i + 1}" for i in range(negatives)]
    made = []
    for i in range(rows):
        # Fewer passages than rows: the same positive comes back in a batch.
        numbers = {"positive": i % 5, **{name: 5 + (i + k) % 3 for k, name in enumerate(names)}}
        row: dict[str, Any] = {"query": f"{QUERIES[i % 8]} {i}"}
        row |= {name: PASSAGES[number] for name, number in numbers.items()}
        if ids:
            row |= {"query_id": f"q{i}", **{f"{name}_id": f"p{number}" for name, number in numbers.items()}}
            row["known_positive_ids"] = [f"p{i % 5}", f"p{(i + 1) % 5}"][: 2 if i % 3 == 0 else 1]
        made.append(row)
    return Dataset.from_list(made)


def with_scores(rows: int = 16, *, negatives: int = 1) -> Dataset:
    """As :func:`triples`, with a column of stored scores."""
    drawn = np.random.default_rng(1).normal(0, 2, (rows, 1 + negatives))
    return triples(rows, negatives=negatives).add_column("scores", drawn.tolist())


def make_teacher(models: Path, kind: str) -> Any:
    """A teacher of a kind, of the models that tests with processes of their own keep in a folder."""
    from sentence_transformers import SentenceTransformer

    from tct_hf import (
        BM25Index,
        BM25Teacher,
        ColBERTTeacher,
        CrossEncoderTeacher,
        DenseTeacher,
        StoredScores,
        TeacherEnsemble,
    )

    if kind == "narrow":  # of other dimensions than the students
        return DenseTeacher(SentenceTransformer(str(models / "plain"), device="cpu", truncate_dim=16), dtype="float32")
    if kind in ("bm25", "dense", "log-linear"):
        bm25 = BM25Teacher(BM25Index.build(PASSAGES, map(str, range(len(PASSAGES))), backend="numpy"))
        dense = DenseTeacher(str(models / "plain"), dtype="float32")
        mixture = TeacherEnsemble({StoredScores(): 0.5, bm25: 0.33, dense: 6.0}, normalize="none")
        return {"bm25": bm25, "dense": dense, "log-linear": mixture}[kind]
    colbert = ColBERTTeacher(str(models / "teacher" / "colbert"), dtype="float32")
    if kind == "colbert":
        return colbert
    if kind == "stored":
        return StoredScores()
    if kind == "table":  # of the ids of :func:`triples`
        drawn = np.random.default_rng(2).normal(0, 2, (64, len(PASSAGES))).tolist()
        table = {f"q{i}": {f"p{j}": score for j, score in enumerate(scores)} for i, scores in enumerate(drawn)}
        return StoredScores(table, cache_dir=models / "tables")
    candidates: Any = "own" if kind == "cross-encoder" else "in-batch"
    live = CrossEncoderTeacher(str(models / "cross-encoder"), candidates=candidates, dtype="float32")
    return TeacherEnsemble({StoredScores(): 2.0, live: 1.0, colbert: 1.0}) if kind == "mixture" else live


def make_models(path: Path, *, dropout: float = 0.0, shared_tokens: bool = True) -> tuple[Any, Any]:
    """A student and a float32 ColBERTTeacher of different weights."""
    from tct_hf import ColBERTTeacher, build_student

    colbert = tiny_colbert(path / "teacher")
    teacher = ColBERTTeacher(str(colbert), dtype="float32")
    base = tiny_bert(path / "base", dropout=dropout, seed=7)
    return build_student(str(base), encoding="tct", document_length=64 if shared_tokens else 48), teacher


def score(teacher: Any, queries: Any, columns: Any, rows: Any = None) -> Any:
    """The teacher's matrix of a batch."""
    return teacher.score_matrix(teacher.collate(queries, columns, rows or [{}] * len(queries)), gather=False)


def save_models(path: Path, *, dropout: float = 0.0) -> Path:
    """The models of :func:`make_teacher` and students by name, for tests that load them, or processes of their own."""
    from tct_hf import build_student

    base, modern = str(path / "base"), str(tiny_modernbert(path / "modernbert", dropout=dropout))
    student, _ = make_models(path, dropout=dropout)
    made: dict[str, Any] = {
        "student": student,
        "other": build_student(base, encoding="tct", document_length=48),  # other tokens than the teacher's
        "scaled": build_student(base, encoding="tct", document_length=64, pooling="cls", scale=20.0),
        "plain": build_student(modern, document_length=64, pooling="cls"),
        "small": build_student(modern, document_length=64, layers=[0, 2]),
        "sparse": make_splade(path, dropout=dropout),
    }
    for name, model in made.items():
        model.save_pretrained(str(path / name))
    tiny_cross_encoder(path / "cross-encoder")
    return path


def make_splade(path: Path, *, dropout: float = 0.0) -> Any:
    """A sparse student of a vocabulary of about a hundred words."""
    from tct_hf import build_splade

    return build_splade(str(tiny_mlm(path / "mlm", dropout=dropout)), query_length=24, document_length=48)


def make_stage(path: Path, *, arguments: dict[str, Any], **options: Any) -> Any:
    """A stage on the CPU that publishes `path/final`."""
    from tct_hf.training.stages import Stage

    given = {"report_to": "none", "use_cpu": True, "logging_steps": 1, **arguments}
    options = {"settings": {}, "write": lambda line: None, **options}
    return Stage(path / "final", path / "work", arguments=given, **options)


def make_trainer(path: Path, student: Any, teacher: Any, dataset: Any, **settings: Any) -> Any:
    """Of the kind that the student takes."""
    from sentence_transformers import SparseEncoder

    from tct_hf import SparseTCTTrainer, SparseTCTTrainingArguments, TCTTrainer, TCTTrainingArguments

    given = ("eval_dataset", "evaluator", "callbacks", "loss", "model_init")
    extra = {key: settings.pop(key) for key in given if key in settings}
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 5,
        "use_cpu": True,
        "disable_tqdm": True,
        "temperature": 1.0,
    }
    sparse = isinstance(student, SparseEncoder)
    make_args: Any = SparseTCTTrainingArguments if sparse else TCTTrainingArguments
    make: Any = SparseTCTTrainer if sparse else TCTTrainer
    args = make_args(output_dir=str(path), **{**defaults, **settings})
    return make(student, teacher, args, train_dataset=dataset, **extra)


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def log_softmax(values: np.ndarray) -> np.ndarray:
    return values - values.max() - math.log(np.exp(values - values.max()).sum())


def numpy_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    *,
    temperature: float,
    student_temperature: float,
    weight: float,
    margin_weight: float = 0.0,
    divisor: float = 1.0,
    reverse: bool = False,
    mask: np.ndarray | None = None,
    positive: list[int] | None = None,
) -> tuple[float, ...]:
    """All parts, row by row over the candidates that are left: no mask, no -inf, float64 throughout."""
    student, teacher = student.astype(np.float64) / divisor, teacher.astype(np.float64)
    positive = list(range(len(student))) if positive is None else positive
    hard = soft = margins = 0.0
    for i, column in enumerate(positive):
        kept = [c for c in range(student.shape[1]) if mask is None or mask[i, c]]
        if not kept:
            continue
        p = log_softmax(teacher[i, kept] / temperature)
        q = log_softmax(student[i, kept] / student_temperature)
        if reverse:
            p, q = q, p
        soft += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        if column >= 0:
            hard -= log_softmax(student[i, kept])[kept.index(column)]
            squares = [
                ((student[i, column] - student[i, c]) - (teacher[i, column] - teacher[i, c])) ** 2
                for c in kept
                if c != column
            ]
            margins += sum(squares) / max(len(squares), 1)
    labelled = sum(column >= 0 for column in positive)
    parts = weight * hard / max(labelled, 1), (1 - weight) * soft / len(student)
    return (*parts, margin_weight * margins / max(labelled, 1)) if margin_weight else parts


def batch_and_targets(trainer: Any) -> tuple[Any, Any]:
    """The training rows as one batch in their order, and what the loss is told of it."""
    from tct_hf.training.collator import BATCH_KEY

    batch = trainer.data_collator(list(trainer.train_dataset))
    features, _ = trainer.collect_features({key: value for key, value in batch.items() if key != BATCH_KEY})
    return batch, trainer.teacher_targets(features, batch[BATCH_KEY], getattr(trainer.loss, "loss", trainer.loss))


def reference_of_batch(
    student: Any, teacher: Any, rows: Dataset, *, own_only: bool = False, **settings: Any
) -> tuple[float, ...]:
    """The :func:`numpy_loss` of a batch of `rows`, of texts encoded anew and candidates chosen by their ids."""
    columns = ["positive"] + [name for name in rows.column_names if name.startswith("negative") and "_id" not in name]
    passages = [text for column in columns for text in rows[column]]
    ids = [key for column in columns for key in rows[f"{column}_id"]]
    queries, documents = student.encode_query(list(rows["query"])), student.encode_document(passages)
    scores = student.similarity(queries, documents).double().cpu().numpy()
    colbert = teacher.model
    told = colbert.similarity(colbert.encode_query(list(rows["query"])), colbert.encode_document(passages)).numpy()
    labelled = list(rows["labelled"]) if "labelled" in rows.column_names else [True] * len(rows)
    mask = np.array(
        [
            [
                (c == i or not labelled[i] or (name != ids[i] and name not in known))
                and (not own_only or c % len(rows) == i)
                for c, name in enumerate(ids)
            ]
            for i, known in enumerate(rows["known_positive_ids"])
        ]
    )
    positive = [i if labelled[i] else -1 for i in range(len(rows))]
    return numpy_loss(scores, told, mask=mask, positive=positive, **settings)
