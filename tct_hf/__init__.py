"""TCT-ColBERT: distil a live late-interaction teacher into a single-vector retriever (arXiv 2010.11386)."""

from __future__ import annotations

import dis
import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from tct_hf.data.beir import load_beir as load_beir
    from tct_hf.data.builtin import builtin_corpus as builtin_corpus
    from tct_hf.data.collection import Collection as Collection
    from tct_hf.data.collection import load_collection as load_collection
    from tct_hf.data.expander import expand_corpus as expand_corpus
    from tct_hf.data.expander import load_expander as load_expander
    from tct_hf.data.expansion import expanded_texts as expanded_texts
    from tct_hf.data.expansion import load_expansions as load_expansions
    from tct_hf.data.expansion import write_expansions as write_expansions
    from tct_hf.data.rows import SkippedRows as SkippedRows
    from tct_hf.encoding.build import build_colbert as build_colbert
    from tct_hf.encoding.build import build_splade as build_splade
    from tct_hf.encoding.build import build_student as build_student
    from tct_hf.encoding.build import save_student as save_student
    from tct_hf.encoding.build import student_from_teacher as student_from_teacher
    from tct_hf.encoding.checkpoint import finalise_checkpoint as finalise_checkpoint
    from tct_hf.encoding.checkpoint import validate_checkpoint as validate_checkpoint
    from tct_hf.encoding.convert import convert_checkpoint as convert_checkpoint
    from tct_hf.encoding.convert import load_student as load_student
    from tct_hf.encoding.export import export as export
    from tct_hf.encoding.static import build_static as build_static
    from tct_hf.evaluation.cost import measure_efficiency as measure_efficiency
    from tct_hf.evaluation.measures import evaluate_run as evaluate_run
    from tct_hf.evaluation.report import Report as Report
    from tct_hf.evaluation.reporting import build_report as build_report
    from tct_hf.evaluation.significance import compare_runs as compare_runs
    from tct_hf.evaluation.tune_alpha import tune_alpha as tune_alpha
    from tct_hf.hub.release import release as release
    from tct_hf.retrieval.bm25 import BM25Index as BM25Index
    from tct_hf.retrieval.bm25 import expanded_bm25 as expanded_bm25
    from tct_hf.retrieval.dense import DenseIndex as DenseIndex
    from tct_hf.retrieval.encode_batch import EncodeBatch as EncodeBatch
    from tct_hf.retrieval.encode_corpus import encode_corpus as encode_corpus
    from tct_hf.retrieval.engines.milvus import MilvusIndex as MilvusIndex
    from tct_hf.retrieval.engines.postgres import PgVectorIndex as PgVectorIndex
    from tct_hf.retrieval.fusion import fuse as fuse
    from tct_hf.retrieval.fusion import reciprocal_rank_fusion as reciprocal_rank_fusion
    from tct_hf.retrieval.miner import MiningCounts as MiningCounts
    from tct_hf.retrieval.mining import mine_triples as mine_triples
    from tct_hf.retrieval.negatives import bm25_triples as bm25_triples
    from tct_hf.retrieval.negatives import collection_bm25 as collection_bm25
    from tct_hf.retrieval.negatives import collection_triples as collection_triples
    from tct_hf.retrieval.pyterrier import pyterrier_index as pyterrier_index
    from tct_hf.retrieval.pyterrier import pyterrier_student as pyterrier_student
    from tct_hf.retrieval.runs import read_run as read_run
    from tct_hf.retrieval.runs import write_run as write_run
    from tct_hf.retrieval.sparse import SparseIndex as SparseIndex
    from tct_hf.retrieval.towers import query_tower as query_tower
    from tct_hf.retrieval.triples import load_triples as load_triples
    from tct_hf.retrieval.vectors import load_vectors as load_vectors
    from tct_hf.teachers.base import NoTeacher as NoTeacher
    from tct_hf.teachers.base import Teacher as Teacher
    from tct_hf.teachers.bm25 import BM25Teacher as BM25Teacher
    from tct_hf.teachers.cached import CachedTeacher as CachedTeacher
    from tct_hf.teachers.causal import CausalRerankerTeacher as CausalRerankerTeacher
    from tct_hf.teachers.colbert import ColBERTTeacher as ColBERTTeacher
    from tct_hf.teachers.colbert import DenseTeacher as DenseTeacher
    from tct_hf.teachers.cross_encoder import CrossEncoderTeacher as CrossEncoderTeacher
    from tct_hf.teachers.ensemble import TeacherEnsemble as TeacherEnsemble
    from tct_hf.teachers.mixture import Calibration as Calibration
    from tct_hf.teachers.mixture import calibrate as calibrate
    from tct_hf.teachers.mixture import free_mixture as free_mixture
    from tct_hf.teachers.mixture import search_mixture as search_mixture
    from tct_hf.teachers.queries import QueryVectors as QueryVectors
    from tct_hf.teachers.remote import RemoteTeacherError as RemoteTeacherError
    from tct_hf.teachers.remote import URLTeacher as URLTeacher
    from tct_hf.teachers.scoring import score_expansions as score_expansions
    from tct_hf.teachers.scoring import score_triples as score_triples
    from tct_hf.teachers.stored import StoredScores as StoredScores
    from tct_hf.training.arguments import LossSchedule as LossSchedule
    from tct_hf.training.arguments import Schedule as Schedule
    from tct_hf.training.arguments import SparseTCTTrainingArguments as SparseTCTTrainingArguments
    from tct_hf.training.arguments import TCTTrainingArguments as TCTTrainingArguments
    from tct_hf.training.collator import TCTDataCollator as TCTDataCollator
    from tct_hf.training.embeddings import embedding_loss as embedding_loss
    from tct_hf.training.loss import TeacherTargets as TeacherTargets
    from tct_hf.training.loss import TightlyCoupledLoss as TightlyCoupledLoss
    from tct_hf.training.loss import coupled_loss as coupled_loss
    from tct_hf.training.sparse_trainer import CollapsedStudent as CollapsedStudent
    from tct_hf.training.sparse_trainer import SparseTCTTrainer as SparseTCTTrainer
    from tct_hf.training.trainer import TCTTrainer as TCTTrainer

# The imports above are the table of public names, read from the compiled code, which zip files and frozen programs
# have too. At run time none of them is made until its name is asked for: `import tct_hf` must not import torch.
_MODULE_OF: dict[str, str] = {}
for _step in dis.get_instructions(sys._getframe().f_code):
    if _step.opname == "IMPORT_NAME":
        _module = _step.argval
    elif _step.opname == "IMPORT_FROM" and _module.startswith("tct_hf."):
        _MODULE_OF[_step.argval] = _module

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tct_hf' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
