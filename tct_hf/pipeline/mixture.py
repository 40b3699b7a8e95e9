"""What is found before training, once: weights of teachers, calibrated on dev, and a mixture's best passages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tct_hf.data.collection import Collection
from tct_hf.encoding.build import build_student
from tct_hf.files import CLAIM_FILE, is_claimed, replace_dir, staging_beside, write_json_atomic
from tct_hf.hub_client import resolve_model
from tct_hf.pipeline.settings import DataSettings, EncoderSettings, TrainSettings
from tct_hf.retrieval.runs import Run, read_run, write_run
from tct_hf.teachers.base import Teacher
from tct_hf.teachers.calibration import calibrate
from tct_hf.teachers.colbert import DenseTeacher
from tct_hf.teachers.mixture import members_of, search_mixture, weights_of


def what_to_find(
    settings: TrainSettings, data: DataSettings, collection: Collection, own_triples: bool
) -> tuple[bool, dict[str, str]]:
    """Whether the teacher is calibrated, and the questions that it searches for.

    A mixture is calibrated where labels are used, dev is judged and no weights are given; any other teacher where
    `student.training.temperature` is "auto".
    """
    teaching, temperature = settings.teacher, settings.student.training.get("temperature")
    calibrates = (
        (teaching.is_mixture if temperature is None else temperature == "auto")
        and teaching.mixture_weights is None
        and data.labels > 0
        and "dev" in collection.splits
        and bool(collection.splits["dev"].qrels)
        # Stored scores are known of their own pairs alone, not of what a search finds.
        and not any(one.kind == "stored" for one in teaching.parts)
    )
    queries: dict[str, str] = {}
    if teaching.is_mixture and not own_triples:
        queries = collection.unjudged(data.labels, data.max_questions) if data.unlabelled else {}
        if data.negatives == "teacher" and "train" in collection.splits:
            queries |= collection.splits["train"].queries
    return calibrates, queries


def find(
    folder: Path,
    depends: Mapping[str, Any],
    collection: Collection,
    make_teacher: Callable[[], Teacher],
    encoder: EncoderSettings,
    queries: Mapping[str, str],
    *,
    calibrates: bool,
    is_mixture: bool,
    write: Callable[[str], None],
) -> tuple[list[float], Run]:
    """The weights of the teacher's members and the best passages of `queries`, kept in `folder`.

    Args:
        depends: all that they depend on.
        encoder: of the student, which a teacher that is no mixture is calibrated beside.
    """
    if not is_claimed(folder, depends):
        teacher = make_teacher()
        with staging_beside(folder) as staging:
            staging.mkdir(parents=True)
            if calibrates:
                if is_mixture:  # its first member is the base, which the student starts from
                    student = next(iter(members_of(teacher).values()))
                else:
                    student = DenseTeacher(build_student(resolve_model(encoder.base_model), **encoder.reads))
                try:
                    found = calibrate(teacher, collection, student=student)
                except ValueError as error:
                    if not is_mixture:
                        raise
                    write(f"  not calibrated, the default weights stay: {error}")
                else:
                    write("  " + found.summary().replace("\n", "\n  "))
                    found.save(staging)
            if queries:
                write(f"  {len(queries):,} questions: the mixture searches {len(collection.corpus):,} passages")
            write_run(search_mixture(teacher, collection, queries), staging / "candidates.trec", "mixture")
            write_json_atomic(staging / "weights.json", weights_of(teacher))
            write_json_atomic(staging / CLAIM_FILE, depends)
            replace_dir(staging, folder)
    weights = json.loads((folder / "weights.json").read_text(encoding="utf-8"))
    return weights, read_run(folder / "candidates.trec") if queries else {}
