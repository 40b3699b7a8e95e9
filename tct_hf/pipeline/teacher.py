"""The teacher of a recipe: its settings, what is wrong with them before any training, and the teacher they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf.data.rows import is_hub_id, is_score_file
from tct_hf.files import file_digest
from tct_hf.settings import SettingsError, setting

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from tct_hf.pipeline.settings import EncoderSettings
    from tct_hf.retrieval.bm25 import BM25Index
    from tct_hf.teachers.base import Teacher


@dataclass
class OneTeacher:
    """A teacher, or one of several that are mixed."""

    kind: Literal["colbert", "dense", "own", "bm25", "cross-encoder", "stored"] = setting(
        "colbert", "what it is; dense: an embedding model; own: its token vectors; bm25: the words of the collection"
    )
    model: str | None = setting(None, "folder or Hub id of the model; a ColBERT is trained when none")
    scores: str | None = setting(
        None,
        "stored: scores or teacher_score, columns of the triples; or query_id, passage_id, score: a file, or a Hub id "
        "(owner/name:configuration:split)",
    )
    candidates: Literal["own", "in-batch"] = setting(
        "own", "that a cross-encoder scores; in-batch is every query with every passage: dear"
    )
    weight: float = setting(1.0, "beside the others")

    @property
    def covers(self) -> str:
        """Which candidates it scores."""
        return {"cross-encoder": self.candidates, "stored": "own"}.get(self.kind, "in-batch")

    @property
    def name(self) -> str:
        """What it is called in what a run says."""
        return self.model or ("BM25" if self.kind == "bm25" else f"the table or column of scores {self.scores}")

    @property
    def column(self) -> str | None:
        """The triples' columns that stored scores are in; None where they are in a file."""
        return None if self.scores is None or is_score_file(self.scores) else self.scores


@dataclass
class TeacherSettings(OneTeacher):
    """A teacher to use, or how a ColBERT is trained; others mixed with it."""

    kind: Literal["mixture", "self", "colbert", "dense", "own", "bm25", "cross-encoder", "stored"] | None = setting(  # type: ignore[assignment]
        None,
        "mixture: the base as it is, its own token vectors and BM25; self: the student's own token vectors and BM25; "
        "none: a mixture, with tct or a model a ColBERT",
    )
    mixture_weights: list[float] | None = setting(
        None, "of a mixture's pooled vectors, BM25 and own MaxSim; none: calibrated on dev, or 6, 0.33, 12"
    )
    mixed_with: list[OneTeacher] = setting([], "more teachers, such as [{kind: stored, scores: teacher_score}]")
    normalize: Literal["standard", "softmax", "none"] = setting(
        "standard", "of scores that are mixed; see TeacherEnsemble"
    )
    dim: int | None = setting(None, "with tct: dimensions of a token vector, 128 when none")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "what the teacher computes in")
    training: dict[str, Any] = setting(
        {}, "arguments of its training", keys_of="sentence_transformers:MultiVectorEncoderTrainingArguments"
    )

    def settle(self, encoder: EncoderSettings) -> None:
        """Fill in what is left open: the kind, and the base model of a mixture."""
        if self.kind is None:
            self.kind = "mixture" if encoder.encoding == "own" and self.model is None else "colbert"
        if self.is_mixture and self.model is None:
            self.model = encoder.base_model

    @property
    def is_mixture(self) -> bool:
        """Teachers that nobody has to train, log-linear."""
        return self.kind in ("mixture", "self")

    @property
    def is_trained_here(self) -> bool:
        """A ColBERT of this run."""
        return self.kind in (None, "colbert") and self.model is None

    @property
    def parts(self) -> list[OneTeacher]:
        """All that teach."""
        if not self.is_mixture:
            return [self, *self.mixed_with]
        from tct_hf.teachers.mixture import DEFAULT_WEIGHTS

        pooled, words, tokens = self.mixture_weights or DEFAULT_WEIGHTS
        free = [
            OneTeacher("dense", model=self.model, weight=pooled),
            OneTeacher("bm25", weight=words),
            OneTeacher("own", model=self.model, weight=tokens),
        ]
        return [*(free if self.kind == "mixture" else free[1:2]), *self.mixed_with]

    @property
    def score_columns(self) -> str | None:
        """The triples' columns of stored scores, of whichever part."""
        return next((one.column for one in self.parts if one.column is not None), None)


def check_part(one: OneTeacher, prefix: str, *, model: str = "model", trains: bool = False) -> None:
    """Refuse a teacher that lacks what its kind needs.

    Args:
        one: its settings. A path is told from a Hub id, owner/name, by its many or leading parts.
        prefix: of its settings' names, for messages.
        model: the name of its model's setting.
        trains: a ColBERT without a model is trained.

    Raises:
        SettingsError: with the mend.
    """
    if one.kind in ("stored", "bm25") and one.model is not None:
        what = "stored scores need" if one.kind == "stored" else "BM25 needs"
        raise SettingsError(f"{prefix}{model}: {what} no model; leave it out, or choose another kind")
    if one.kind == "stored":
        if one.scores is None:
            raise SettingsError(
                f"{prefix}scores: name the stored scores, columns of the triples (scores, teacher_score) or a file"
            )
        if one.candidates == "in-batch":
            raise SettingsError(f"{prefix}candidates: stored scores are of a query's own candidates; leave it out")
        path = Path(one.scores)
        if one.column is None and not path.is_file() and not is_hub_id(one.scores):
            raise SettingsError(f"{prefix}scores: {path}: no such file of scores; give the right path")
        return
    if one.scores is not None:
        raise SettingsError(f'{prefix}scores: a {one.kind} scores live; leave it out, or set {prefix}kind to "stored"')
    embedding = "an embedding model"
    names = {"colbert": "a ColBERT", "dense": embedding, "own": embedding, "bm25": "BM25"}
    what = names.get(one.kind, "a cross-encoder")
    if one.candidates == "in-batch" and one.kind != "cross-encoder":
        raise SettingsError(f"{prefix}candidates: {what} scores the whole batch always; leave it out")
    if one.kind == "bm25":
        return
    name = one.model
    if name is None and not trains:
        raise SettingsError(f"{prefix}{model}: name the folder or Hub id of {what}")
    if name is not None and not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise SettingsError(
            f"{prefix}{model}: {name} is not there, and no Hub id (owner/name) either. "
            + (
                "Train one with recipes/train.py recipes/paper.yaml, or name the folder of a ColBERT."
                if one.kind == "colbert"
                else f"Name the folder of {what}."
            )
        )


def check_teacher(teacher: TeacherSettings) -> None:
    """Refuse a `teacher` that lacks what its kind, or the kind of one that it is mixed with, needs.

    Raises:
        SettingsError: with the mend.
    """
    teacher.kind = teacher.kind or "colbert"
    if teacher.mixture_weights is not None and (not teacher.is_mixture or len(teacher.mixture_weights) != 3):
        raise SettingsError(
            "teacher.mixture_weights: give three numbers, of a mixture's pooled vectors, BM25 and own MaxSim"
        )
    if teacher.is_mixture:
        default = TeacherSettings()
        for name in ("scores", "weight", "normalize", "dim", "training"):
            if getattr(teacher, name) != getattr(default, name):
                raise SettingsError(f"teacher.{name} has no effect on a mixture: leave it out, or set teacher.kind")
    else:
        check_part(teacher, "teacher.", trains=teacher.kind == "colbert")
    for place, one in enumerate(teacher.mixed_with):
        check_part(one, f"teacher.mixed_with[{place}].")
    for one in teacher.parts:
        if not 0.0 < one.weight < float("inf"):
            raise SettingsError(f"teacher: a weight is {one.weight}; give numbers above 0")
    if len(teacher.parts) == 1:
        for name, given in (("weight", teacher.weight != 1.0), ("normalize", teacher.normalize != "standard")):
            if given:
                raise SettingsError(
                    f"teacher.{name} is of teachers that are mixed, and there is one: leave it out, or name others in "
                    "teacher.mixed_with"
                )
    if teacher.dtype != "auto" and all(one.kind in ("stored", "bm25") for one in teacher.parts):
        raise SettingsError("teacher.dtype: no model computes these scores; leave it out")
    if len({one.column for one in teacher.parts if one.column is not None}) > 1:
        raise SettingsError("teacher: stored scores from two sets of columns; keep one, and give the other as a file")


def check_teaching(teacher: TeacherSettings, student: Any, encoder: EncoderSettings, *, triples: str | None) -> None:
    """Refuse a teacher that can't teach this student this way.

    Args:
        teacher: checked by :func:`check_teacher`.
        student: the settings of the student.
        encoder: says where a student starts that does not say it itself.
        triples: the path of the user's own triples.

    Raises:
        SettingsError: with the mend.
    """
    if teacher.is_mixture and student.training.get("preset") is not None:
        raise SettingsError(
            "student.training.preset: its temperature belongs to the paper's teacher; leave it out, or set "
            "teacher.kind to colbert"
        )
    candidates = student.training.get("candidates", "in-batch")
    if candidates == "in-batch" and all(one.covers == "own" for one in teacher.parts):
        mend = ', or accept the cost with teacher.candidates: "in-batch"' if teacher.kind == "cross-encoder" else ""
        raise SettingsError(
            f"teacher.kind: a {teacher.kind} teacher scores a query's own candidates only; set "
            f"student.training.candidates to own, mix it with a ColBERT (teacher.mixed_with){mend}"
        )
    if candidates == "own":
        for one in teacher.parts:
            if one.candidates == "in-batch":
                raise SettingsError(
                    "teacher.candidates: the cross-encoder would score every query with every passage, and the "
                    "student compares a query's own; leave it out, or set student.training.candidates to in-batch"
                )
    if teacher.kind not in (None, "colbert") and encoder.starts_from(student.initialise_from) == "teacher":
        raise SettingsError(
            f"student.initialise_from: there is no encoder to take from a {teacher.kind} teacher; set it to base"
        )
    if student.teacher_cache is not None and all(one.kind not in ("colbert", "dense", "own") for one in teacher.parts):
        raise SettingsError(
            "student.teacher_cache: it keeps vectors of a ColBERT or an embedding model; there is none"
        )
    if triples is None and teacher.score_columns is not None:
        raise SettingsError(
            f"teacher.scores: {teacher.score_columns} are columns of triples, or a file that is not there; name the "
            "triples with triples.path (recipes/score.py writes them), or give the right path of a file"
        )


def check_scores(
    teacher: TeacherSettings,
    rows: Dataset | IterableDataset | None,
    make_rows: Callable[[], Dataset],
) -> None:
    """Read the files of stored scores before anything is trained, and look every row up in them.

    Args:
        teacher: checked by :func:`check_teacher`.
        rows: the user's own triples; streamed ones are looked up as they come.
        make_rows: gives those of the collection, where there are no others; called when there is a file to look in.

    Raises:
        ValueError, FileNotFoundError: as `StoredScores`; a row's score is missing.
    """
    from datasets import Dataset

    from tct_hf.teachers.stored import StoredScores

    for one in teacher.parts:
        if one.kind != "stored" or one.column is not None:
            continue
        stored = StoredScores(one.scores)
        if rows is None:
            stored.check_rows(
                make_rows(),
                mend="score the pair, or name triples that are scored with triples.path (of a collection's own, seed, "
                "data.num_negatives and data.negative_depth choose the negatives)",
            )
            continue
        if not rows.column_names:
            continue
        stored.check(rows.column_names, candidates="own")
        if isinstance(rows, Dataset):
            stored.check_rows(rows)


def check_colbert(teacher: TeacherSettings) -> None:
    """Refuse what is no single ColBERT, where a recipe trains, mines or reports with one."""
    teacher.kind = teacher.kind or "colbert"
    if teacher.kind != "colbert" or teacher.mixed_with:
        raise SettingsError(
            "teacher.kind, teacher.mixed_with: this recipe works with a ColBERT alone; use recipes/train.py for others"
        )


def make_part(
    one: OneTeacher,
    model: str | None,
    *,
    dtype: Any,
    index: Callable[[], BM25Index] | None = None,
    reads: Mapping[str, Any] | None = None,
) -> Teacher:
    """Load one teacher.

    Args:
        one: its settings.
        model: folder or Hub id; None where the kind has none.
        dtype: it computes in.
        index: gives the collection's BM25 index, for the kind bm25.
        reads: lengths and prompts of an embedding model, arguments of `build_student`; its own when None.
    """
    from tct_hf.encoding.build import build_colbert, build_student
    from tct_hf.hub_client import resolve_model
    from tct_hf.teachers.bm25 import BM25Teacher
    from tct_hf.teachers.colbert import ColBERTTeacher, DenseTeacher
    from tct_hf.teachers.cross_encoder import CrossEncoderTeacher
    from tct_hf.teachers.stored import StoredScores

    if one.kind == "stored":
        # Triples that are loaded with scores have them in a column of that name.
        return StoredScores(column="scores") if one.column is not None else StoredScores(one.scores)
    if one.kind == "bm25":
        assert index is not None
        return BM25Teacher(index())
    assert model is not None
    if one.kind == "cross-encoder":
        return CrossEncoderTeacher(model, candidates=one.candidates, dtype=dtype)
    if one.kind == "own":
        return ColBERTTeacher(build_colbert(resolve_model(model), **(reads or {})), dtype=dtype)
    if one.kind == "dense":
        return DenseTeacher(build_student(resolve_model(model), **(reads or {})), dtype=dtype)
    return ColBERTTeacher(model, dtype=dtype)


def make_teacher(
    teacher: TeacherSettings,
    model: str | None,
    *,
    index: Callable[[], BM25Index] | None = None,
    reads: Mapping[str, Any] | None = None,
    cache: str | None = None,
    cache_gigabytes: float = 20.0,
) -> Teacher:
    """The teacher of a run: one, or several mixed.

    Args:
        teacher: the settings.
        model: of the first one, where it has any.
        index: gives the collection's BM25 index, for a part of the kind bm25.
        reads: of the base of a mixture, as in :func:`make_part`.
        cache: folder for vectors of ColBERTs and embedding models; none: encode every time.
        cache_gigabytes: that each may take.
    """
    from tct_hf.teachers.cached import CachedTeacher
    from tct_hf.teachers.colbert import DenseTeacher, VectorTeacher
    from tct_hf.teachers.ensemble import TeacherEnsemble
    from tct_hf.teachers.mixture import by_cosine

    made: list[tuple[Teacher, float]] = []
    for one in teacher.parts:
        name = model if one is teacher else one.model
        base = teacher.is_mixture and one.model == teacher.model
        live = make_part(one, name, dtype=teacher.dtype, index=index, reads=reads if base else None)
        if base and isinstance(live, DenseTeacher):
            by_cosine(live.model)
        if cache is not None and isinstance(live, VectorTeacher):
            live = CachedTeacher(live, cache, max_gigabytes=cache_gigabytes)
        made.append((live, one.weight))
    if teacher.is_mixture:
        return TeacherEnsemble(made, normalize="none")
    return TeacherEnsemble(made, normalize=teacher.normalize) if len(made) > 1 else made[0][0]


def weights_of(teacher: TeacherSettings) -> Mapping[str, Any]:
    """The settings, and digests of what they name where it is a file here, JSON-ready."""

    def digest(one: OneTeacher) -> str | None:
        if one.kind == "stored":
            return None if one.scores is None or one.column is not None else file_digest(one.scores)
        return None if one.model is None else file_digest(Path(one.model) / "model.safetensors")

    found = asdict(teacher)
    for section, one in zip([found, *found["mixed_with"]], [teacher, *teacher.mixed_with], strict=True):
        ready = digest(one)
        if ready is not None:
            section["weights"] = ready
    return found
