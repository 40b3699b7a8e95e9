"""TCT-ColBERT: distil a live late-interaction teacher into a single-vector retriever (arXiv 2010.11386)."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

# Public name -> module. Nothing here is imported until it is asked for: `import tct_hf` must not import torch.
_PUBLIC = {
    "build_student": "encoding",
    "student_from_teacher": "encoding",
    "build_colbert": "encoding",
    "save_student": "encoding",
    "finalise_checkpoint": "encoding",
    "validate_checkpoint": "encoding",
    "Teacher": "teachers",
    "ColBERTTeacher": "vector_teachers",
    "DenseTeacher": "vector_teachers",
    "BM25Teacher": "bm25_teacher",
    "NoTeacher": "teachers",
    "CachedTeacher": "cached_teacher",
    "CrossEncoderTeacher": "cross_encoder_teacher",
    "StoredScores": "stored_scores",
    "TeacherEnsemble": "teacher_ensemble",
    "calibrate": "calibration",
    "Calibration": "calibration",
    "free_mixture": "mixture",
    "search_mixture": "mixture",
    "score_triples": "scoring",
    "coupled_loss": "losses",
    "TightlyCoupledLoss": "losses",
    "TeacherTargets": "losses",
    "LossSchedule": "schedules",
    "Schedule": "schedules",
    "StallWatch": "stalls",
    "TCTTrainer": "trainer",
    "TCTTrainingArguments": "arguments",
    "build_splade": "splade",
    "SparseTCTTrainer": "trainer",
    "SparseTCTTrainingArguments": "arguments",
    "CollapsedStudent": "sparsity",
    "TCTDataCollator": "trainer",
    "builtin_corpus": "data",
    "load_beir": "data",
    "bm25_triples": "data",
    "mine_triples": "data",
    "MiningCounts": "data",
    "load_triples": "data",
    "SkippedRows": "data",
    "expand_corpus": "data",
    "load_expander": "data",
    "score_expansions": "data",
    "expanded_texts": "data",
    "load_expansions": "data",
    "write_expansions": "data",
    "BM25Index": "retrieval",
    "expanded_bm25": "retrieval",
    "DenseIndex": "retrieval",
    "SparseIndex": "retrieval",
    "encode_corpus": "retrieval",
    "load_vectors": "retrieval",
    "read_run": "retrieval",
    "write_run": "retrieval",
    "fuse": "retrieval",
    "tune_alpha": "retrieval",
    "reciprocal_rank_fusion": "retrieval",
    "load_student": "hub",
    "convert_checkpoint": "hub",
    "release": "hub",
    "evaluate_run": "evaluation",
    "compare_runs": "evaluation",
    "measure_efficiency": "evaluation",
    "Report": "evaluation",
    "build_report": "evaluation",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tct_hf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tct_hf.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
