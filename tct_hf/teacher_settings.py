"""The teacher of a recipe: its settings, what is wrong with them before any training, and the teacher they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf.data.hub_tables import is_hub_table
from tct_hf.files import file_digest
from tct_hf.settings import SettingsError, setting

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from tct_hf.teachers import Teacher


@dataclass
class OneTeacher:
    """A teacher, or one of several that are mixed."""

    kind: Literal["colbert", "cross-encoder", "stored"] = setting("colbert", "what it is")
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
        return {"colbert": "in-batch", "stored": "own"}.get(self.kind, self.candidates)

    @property
    def column(self) -> str | None:
        """The triples' columns that stored scores are in; None where they are in a file."""
        from tct_hf.data.score_table import is_score_file

        return None if self.scores is None or is_score_file(self.scores) else self.scores


@dataclass
class TeacherSettings(OneTeacher):
    """A teacher to use, or how a ColBERT is trained; others mixed with it."""

    mixed_with: list[OneTeacher] = setting([], "more teachers, such as [{kind: stored, scores: teacher_score}]")
    normalize: Literal["standard", "softmax"] = setting("standard", "of scores that are mixed; see TeacherEnsemble")
    dim: int | None = setting(None, "with tct: dimensions of a token vector, 128 when none")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "what the teacher computes in")
    training: dict[str, Any] = setting(
        {}, "arguments of its training", keys_of="sentence_transformers:MultiVectorEncoderTrainingArguments"
    )

    @property
    def is_trained_here(self) -> bool:
        """A ColBERT of this run."""
        return self.kind == "colbert" and self.model is None

    @property
    def parts(self) -> list[OneTeacher]:
        """All that teach."""
        return [self, *self.mixed_with]

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
    if one.kind == "stored":
        if one.scores is None:
            raise SettingsError(
                f"{prefix}scores: name the stored scores, columns of the triples (scores, teacher_score) or a file"
            )
        if one.model is not None:
            raise SettingsError(f"{prefix}{model}: stored scores need no model; leave it out, or choose another kind")
        if one.candidates == "in-batch":
            raise SettingsError(f"{prefix}candidates: stored scores are of a query's own candidates; leave it out")
        path = Path(one.scores)
        if one.column is None and not path.is_file() and not is_hub_table(one.scores):
            raise SettingsError(f"{prefix}scores: {path}: no such file of scores; give the right path")
        return
    if one.scores is not None:
        raise SettingsError(f'{prefix}scores: a {one.kind} scores live; leave it out, or set {prefix}kind to "stored"')
    if one.candidates == "in-batch" and one.kind == "colbert":
        raise SettingsError(f"{prefix}candidates: a ColBERT scores the whole batch always; leave it out")
    name, what = one.model, "a ColBERT" if one.kind == "colbert" else "a cross-encoder"
    if name is None and not trains:
        raise SettingsError(f"{prefix}{model}: name the folder or Hub id of {what}")
    if name is not None and not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise SettingsError(
            f"{prefix}{model}: {name} is not there, and no Hub id (owner/name) either. "
            + (
                "Train one with recipes/train.py recipes/quickstart.yaml (make quickstart), or name the folder of a "
                "ColBERT."
                if one.kind == "colbert"
                else "Name the folder of a cross-encoder."
            )
        )


def check_teacher(teacher: TeacherSettings) -> None:
    """Refuse a `teacher` that lacks what its kind, or the kind of one that it is mixed with, needs.

    Raises:
        SettingsError: with the mend.
    """
    check_part(teacher, "teacher.", trains=teacher.kind == "colbert")
    for place, one in enumerate(teacher.mixed_with):
        check_part(one, f"teacher.mixed_with[{place}].")
    for one in teacher.parts:
        if not 0.0 < one.weight < float("inf"):
            raise SettingsError(f"teacher: a weight is {one.weight}; give numbers above 0")
    if not teacher.mixed_with:
        for name, given in (("weight", teacher.weight != 1.0), ("normalize", teacher.normalize != "standard")):
            if given:
                raise SettingsError(
                    f"teacher.{name} is of teachers that are mixed, and there is one: leave it out, or name others in "
                    "teacher.mixed_with"
                )
    if teacher.dtype != "auto" and all(one.kind == "stored" for one in teacher.parts):
        raise SettingsError("teacher.dtype: stored scores are there, and no model computes any; leave it out")
    if len({one.column for one in teacher.parts if one.column is not None}) > 1:
        raise SettingsError("teacher: stored scores from two sets of columns; keep one, and give the other as a file")


def check_teaching(teacher: TeacherSettings, student: Any, *, triples: str | None) -> None:
    """Refuse a teacher that can't teach this student this way.

    Args:
        teacher: checked by :func:`check_teacher`.
        student: the settings of the student.
        triples: the path of the user's own triples.

    Raises:
        SettingsError: with the mend.
    """
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
    if teacher.kind != "colbert" and student.initialise_from == "teacher":
        raise SettingsError(
            f"student.initialise_from: there is no encoder to take from a {teacher.kind} teacher; set it to base"
        )
    if student.teacher_cache is not None and all(one.kind != "colbert" for one in teacher.parts):
        raise SettingsError("student.teacher_cache: it keeps a ColBERT's token vectors, and there is no ColBERT")
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

    from tct_hf import StoredScores

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
    if teacher.kind != "colbert" or teacher.mixed_with:
        raise SettingsError(
            "teacher.kind, teacher.mixed_with: this recipe works with a ColBERT alone; use recipes/train.py for others"
        )


def make_part(one: OneTeacher, model: str | None, *, dtype: Any) -> Teacher:
    """Load one teacher.

    Args:
        one: its settings.
        model: folder or Hub id; None where the kind has none.
        dtype: it computes in.
    """
    from tct_hf import ColBERTTeacher, CrossEncoderTeacher, StoredScores

    if one.kind == "stored":
        # Triples that are loaded with scores have them in a column of that name.
        return StoredScores(column="scores") if one.column is not None else StoredScores(one.scores)
    assert model is not None
    if one.kind == "cross-encoder":
        return CrossEncoderTeacher(model, candidates=one.candidates, dtype=dtype)
    return ColBERTTeacher(model, dtype=dtype)


def make_teacher(
    teacher: TeacherSettings, model: str | None, *, cache: str | None = None, cache_gigabytes: float = 20.0
) -> Teacher:
    """The teacher of a run: one, or several mixed.

    Args:
        teacher: the settings.
        model: of the first one, where it has any.
        cache: folder for ColBERTs' token vectors; none: encode every time.
        cache_gigabytes: that each may take.
    """
    from tct_hf import CachedTeacher, ColBERTTeacher, TeacherEnsemble

    made: list[tuple[Teacher, float]] = []
    for one in teacher.parts:
        live = make_part(one, model if one is teacher else one.model, dtype=teacher.dtype)
        if cache is not None and isinstance(live, ColBERTTeacher):
            live = CachedTeacher(live, cache, max_gigabytes=cache_gigabytes)
        made.append((live, one.weight))
    return TeacherEnsemble(made, normalize=teacher.normalize) if len(made) > 1 else made[0][0]


def weights_of(teacher: TeacherSettings) -> Mapping[str, Any]:
    """The settings, and digests of what they name where it is a file here, JSON-ready."""

    def digest(one: OneTeacher) -> str | None:
        if one.kind == "stored":
            return None if one.scores is None or one.column is not None else file_digest(one.scores)
        return None if one.model is None else file_digest(Path(one.model) / "model.safetensors")

    found = asdict(teacher)
    for section, one in zip([found, *found["mixed_with"]], teacher.parts, strict=True):
        ready = digest(one)
        if ready is not None:
            section["weights"] = ready
    return found
