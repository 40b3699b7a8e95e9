"""What training tests share: a tiny student and teacher, triples, a trainer, an independent loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from tests.models import tiny_bert, tiny_colbert, tiny_mlm

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
    from tct_hf import (
        BM25Index,
        BM25Teacher,
        ColBERTTeacher,
        CrossEncoderTeacher,
        DenseTeacher,
        StoredScores,
        TeacherEnsemble,
    )

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


def make_splade(path: Path, *, dropout: float = 0.0) -> Any:
    """A sparse student of a vocabulary of about a hundred words."""
    from tct_hf import build_splade

    return build_splade(str(tiny_mlm(path / "mlm", dropout=dropout)), query_length=24, document_length=48)


def make_trainer(path: Path, student: Any, teacher: Any, dataset: Any, **settings: Any) -> Any:
    """Of the kind that the student takes."""
    from sentence_transformers import SparseEncoder

    from tct_hf import SparseTCTTrainer, SparseTCTTrainingArguments, TCTTrainer, TCTTrainingArguments

    extra = {key: settings.pop(key) for key in ("eval_dataset", "evaluator", "callbacks", "loss") if key in settings}
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


def reference_loss(
    student_scores: np.ndarray,
    teacher_scores: np.ndarray,
    passage_ids: list[str],
    own: list[int],
    known: list[list[str]],
    *,
    temperature: float,
    student_temperature: float = 1.0,
    weight: float,
    own_only: bool = False,
    labelled: list[bool] | None = None,
) -> tuple[float, float]:
    """Both parts of the loss in float64, row by row in plain loops: candidates are kept in a list, no mask."""
    rows = len(own)
    labelled = labelled or [True] * rows
    hard = soft = 0.0
    for i, column in enumerate(own):
        keep = [
            c
            for c, name in enumerate(passage_ids)
            if (c == column or not labelled[i] or (name != passage_ids[column] and name not in known[i]))
            and (not own_only or c % rows == i)
        ]

        def log_softmax(values: np.ndarray) -> np.ndarray:
            values = values.astype(np.float64)
            return values - values.max() - np.log(np.exp(values - values.max()).sum())

        log_student = log_softmax(student_scores[i, keep])
        if labelled[i]:
            hard -= log_student[keep.index(column)]
        log_student_soft = log_softmax(student_scores[i, keep] / student_temperature)
        log_teacher = log_softmax(teacher_scores[i, keep] / temperature)
        soft += float((np.exp(log_teacher) * (log_teacher - log_student_soft)).sum())
    return weight * hard / max(sum(labelled), 1), (1 - weight) * soft / len(own)


def reference_of_batch(
    student: Any, teacher: Any, dataset: Dataset, batch: Any, **settings: Any
) -> tuple[float, float]:
    """The :func:`reference_loss` of a batch whose rows are found by their queries and done again from the texts."""
    shuffled = student.tokenizer.batch_decode(batch["query_input_ids"], skip_special_tokens=True)
    names = {
        student.tokenizer.decode(student.tokenizer("[Q] " + q)["input_ids"], skip_special_tokens=True): i
        for i, q in enumerate(dataset["query"])
    }
    rows = dataset.select([names[text] for text in shuffled])
    columns = ["positive"] + [name for name in rows.column_names if name.startswith("negative") and "_id" not in name]
    passages = [text for column in columns for text in rows[column]]
    ids = [key for column in columns for key in rows[f"{column}_id"]]
    student_scores = student.encode_query(rows["query"]) @ student.encode_document(passages).T
    teacher_scores = np.zeros_like(student_scores)
    if teacher is not None:
        colbert = teacher.model
        queries, documents = colbert.encode_query(list(rows["query"])), colbert.encode_document(passages)
        teacher_scores = colbert.similarity(queries, documents).numpy()
    return reference_loss(
        student_scores,
        teacher_scores,
        ids,
        list(range(len(rows))),
        [list(keys) for keys in rows["known_positive_ids"]],
        labelled=list(rows["labelled"]) if "labelled" in rows.column_names else None,
        **settings,
    )
