"""One training run: what it reads, what each of its models depends on, and the stages that train and measure them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SentenceTransformerTrainingArguments
from transformers import set_seed

from tct_hf.cache import prepared
from tct_hf.data.collection import Collection
from tct_hf.data.shards import MANIFEST_FILE
from tct_hf.encoding.build import build_colbert
from tct_hf.encoding.convert import load_encoder
from tct_hf.encoding.routes import passage_model
from tct_hf.evaluation.experiment import check_evaluation
from tct_hf.evaluation.settings import check_codes
from tct_hf.evaluation.training_reports import quick_report
from tct_hf.files import is_claimed, weights_file_digest
from tct_hf.hub_client import resolve_model
from tct_hf.pipeline.checks import check_together, named
from tct_hf.pipeline.data import leave_out_reported, read_collection, read_triples
from tct_hf.pipeline.job import Job
from tct_hf.pipeline.models import begin, check_scores, finish_tower, make_teacher, new_student, prepare, tower_stage
from tct_hf.pipeline.settings import TRAINING, DataSettings, StudentSettings, TrainSettings
from tct_hf.retrieval.negatives import collection_triples
from tct_hf.retrieval.runs import Run
from tct_hf.retrieval.towers import PassageVectors
from tct_hf.settings import SettingsError
from tct_hf.teachers.base import read_training_scale
from tct_hf.training import run as training
from tct_hf.training.arguments import LossSchedule, Schedule
from tct_hf.training.loss import TightlyCoupledLoss
from tct_hf.training.stages import Stage, precision

Rows: TypeAlias = Dataset | IterableDataset  # type: ignore[valid-type]
STUDENTS = ("unlabelled", "stock", "student")


@dataclass
class Training:
    """A training run: models in an output folder, each trained once.

    `read` comes first; then the stages, in any number of calls, of which a finished one is skipped and a stopped one
    goes on.

    Args:
        job: the processes that run it, which say what it does.
        output: folder of the models; `settings.output_dir` when None.
        teacher: folder where a ColBERT is trained, or, without the stage teacher, was; `output/teacher` when None.
        teacher_seed: seed that it is trained with; that of the run when None.
        mixtures: folder of what a mixture finds before training; `output` when None.
        vectors: folder of a mixture's vectors; `output/vectors` when None.
        start: folders of models to train further, by "teacher" and "student".
        make_rows: gives the rows to train on; those of the settings when None.
        also_depends: what the models depend on besides the settings, JSON-ready.
        tower_comes: whether another run makes the model of `student.tower_of` before the student is trained.
    """

    settings: TrainSettings
    job: Job
    output: Path | None = None
    teacher: Path | None = None
    teacher_seed: int | None = None
    mixtures: Path | None = None
    vectors: Path | None = None
    start: Mapping[str, str] = field(default_factory=dict)
    make_rows: Callable[[], Rows] | None = None
    also_depends: Mapping[str, Any] = field(default_factory=dict)
    tower_comes: bool = False

    def __post_init__(self) -> None:
        settings = self.settings
        settings.teacher.settle(settings.encoder)
        check_together(settings)
        self.folder = self.output or Path(settings.output_dir)
        ready = self.teacher is not None and "teacher" not in settings.stages
        self.trains_teacher = not ready and (settings.teacher.is_trained_here or "teacher" in self.start)
        # Trained by this run, or by one before it.
        self.has_own_teacher = self.trains_teacher or self.teacher is not None
        self.kind: training.Kind = "sparse" if settings.student.kind == "splade" else "dense"
        self.base: dict[str, Any] = {"seed": settings.seed, **precision(settings.precision, self.job.state.device)}
        with named("student.schedules"):
            self.schedules = {name: Schedule(**one) for name, one in settings.student.schedules.items()}
            if self.schedules:
                LossSchedule({}, **self.schedules)

    @property
    def teacher_model(self) -> str | None:
        """Folder or Hub id of the model that teaches, None where there is none."""
        return str(self.folder_of("teacher")) if self.has_own_teacher else self.settings.teacher.model

    def read(
        self, read: Callable[..., Collection] = read_collection, write: Callable[[str], None] | None = None
    ) -> None:
        """Read the data, and build what is to be trained once, so that nothing stops the run after hours."""
        settings, write = self.settings, write or self.job.write
        self.collection = read(settings.data, train=settings.triples.path is None)
        write(f"  {self.collection.summary()}")
        self.rows = read_triples(
            settings.triples, seed=settings.seed, write=write, scores=settings.teacher.score_columns
        )
        if self.rows is not None:
            self.rows = leave_out_reported(self.rows, self.collection, write)
        if "student" in settings.stages and not (self.folder / "student").is_dir():
            check_scores(settings.teacher, self.rows, partial(self.rows_of, "student"))
        if "evaluate" in settings.stages:
            if "test" not in self.collection.splits:
                raise SettingsError(
                    f"data.test_split: {self.collection.name} has no {settings.data.test_split} split, and there are "
                    "no data.questions or data.made_questions to hold some out: give one, or leave evaluate out."
                )
            check_evaluation(self.collection, settings.evaluation.measures, settings.evaluation.depth)
        self._build_once()

    def _build_once(self) -> None:
        """Build the models and the training arguments, whose own errors name what is wrong with the settings."""
        settings, student = self.settings, self.settings.student
        if self.trains_teacher:
            with named("teacher"):
                if "teacher" in settings.stages and not self.start:
                    self._new_colbert()
            with named("teacher.training"):
                self._stage("teacher", "late interaction").args(training.ARGUMENTS["late interaction"])
        with named("student.training"):
            self._stage("student", self.kind).args(training.ARGUMENTS[self.kind])
        if student.from_vectors.texts:
            with named("student.from_vectors.training"):
                tower_stage(self, student).args(SentenceTransformerTrainingArguments)
        if all((self.folder / name).is_dir() for name in {"unlabelled", "student"}.intersection(settings.stages)):
            return
        # The model that it starts from may not be there yet: it has the base's encoder.
        if student.tower_of is not None and not self.tower_comes:
            with named("student.tower_of"):
                encoder = passage_model(load_encoder(student.tower_of, device="cpu"))
            if student.passages is not None:
                try:
                    PassageVectors(student.passages, self.collection.corpus, encoder)
                except ValueError as error:
                    raise SettingsError(f"student.passages: {str(error).removeprefix('vectors: ')}") from error
        comes = self.has_own_teacher or (student.stays and self.tower_comes)
        begun = replace(student, initialise_from="base") if comes else student
        if student.kind == "static":  # of all tokens and many passages, made once
            begun = StudentSettings(initialise_from="base")
        with named("student"):
            model = new_student(settings.encoder, begun, self.teacher_model)
        if isinstance(model, SentenceTransformer):
            with named("student.training"):
                TightlyCoupledLoss(model, matryoshka_dims=(dims := student.training.get("matryoshka_dims")))
            with named("evaluation"):
                sizes = dims or [model.get_embedding_dimension() or 1]
                check_codes(settings.evaluation.codes or [], sizes, len(self.collection.corpus))

    def rows_of(self, name: str, candidates: Run | None = None) -> Any:
        """The rows that the model of a stage is trained on.

        Args:
            candidates: a run of a mixture, whose passages the questions without judgements are answered by.
        """
        if self.make_rows is not None:
            return self.make_rows()
        if self.rows is not None:
            return self.rows
        data = self.data_of(name)
        return collection_triples(
            self.collection,
            num_negatives=data.num_negatives,
            depth=data.negative_depth,
            seed=self.settings.seed,
            labels=data.labels,
            unlabelled=data.unlabelled and name not in ("teacher", "stock"),
            max_questions=data.max_questions,
            candidates=candidates or None,
        )

    # What each model depends on: a folder that holds the work of anything else is refused.

    @cached_property
    def of_teacher(self) -> dict[str, Any]:
        """All that a trained teacher depends on, JSON-ready; of one used as it is, its weights."""
        settings = self.settings
        found = {
            **self.base,
            **({} if self.teacher_seed is None else {"seed": self.teacher_seed}),
            "data": settings.data.of_labelled,
            "encoder": asdict(settings.encoder),
            "teacher": settings.teacher.depends(),
            "corpus": self.collection.fingerprint["sha256"],
            **self.also_depends,
        }
        if self.rows is not None:
            fingerprint = None if isinstance(self.rows, IterableDataset) else self.rows._fingerprint
            found["triples"] = {**asdict(settings.triples), "fingerprint": fingerprint}
        return found

    def data_of(self, name: str) -> DataSettings:
        """The data of a stage: the student without labels looks at no judgement."""
        data = self.settings.data
        return replace(data, labels=0.0, unlabelled=True, dev_split=None) if name == "unlabelled" else data

    def depends(self, name: str) -> dict[str, Any]:
        """All that the model of a stage depends on, JSON-ready."""
        if name == "teacher":
            return self.of_teacher
        questions = {key: self.collection.fingerprint.get(key) for key in ("questions", "made_questions")}
        own = {
            "seed": self.settings.seed,
            "data": self.data_of(name).of_trained,
            "student": self.settings.student.depends(),
        }
        return {**self.of_teacher, **questions, **own}

    def of_runs(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Everything the runs of the report depend on, and what the digests in it are of."""
        models = self.students | ({"teacher": Path(self.teacher_model)} if self.teacher_model else {})
        weights = {name: weights_file_digest(path) for name, path in models.items()}
        evaluation = {"depth": self.settings.evaluation.depth, **self.collection.own_rule}
        depends = {**self.depends("student"), "evaluation": evaluation, "weights": weights}
        return depends, {f"weights.{name}": str(path) for name, path in models.items()}

    @property
    def students(self) -> dict[str, Path]:
        """The folders of the models to report, by name, in the order of the table."""
        names = [name for name in ("stock", "unlabelled") if name in self.settings.stages]
        return {name: self.folder / name for name in [*names, "student"]}

    def claim(self) -> None:
        """Refuse an output folder that holds models or runs of other settings."""
        is_claimed(self.folder / "runs", *self.of_runs())
        self.claim_models()

    def claim_models(self) -> None:
        """Refuse an output folder that holds models of other settings."""
        for name in (*(["teacher"] if self.trains_teacher else []), *STUDENTS):
            self.is_trained(name)

    def folder_of(self, name: str) -> Path:
        """The folder of the model of a stage."""
        return self.teacher if name == "teacher" and self.teacher is not None else self.folder / name

    def _work_of(self, name: str) -> Path:
        final = self.folder_of(name)
        return final.parent / "training" / final.name

    def is_trained(self, name: str) -> bool:
        """Whether the model of a stage is there; refuses one of other settings."""
        is_claimed(self._work_of(name), self.depends(name))
        return is_claimed(self.folder_of(name), self.depends(name))

    def run(self, name: str, title: str | None = None) -> None:
        """Train the model of a stage ("teacher", "stock", "unlabelled" or "student"), or say why there is no need."""
        title = title or name
        if name == "teacher" and not self.trains_teacher:
            names = [one.name for one in self.settings.teacher.parts]
            used = f"{' and '.join(names)} {'is used as it is' if len(names) == 1 else 'are used as they are'}"
            self.job.skip(title, used)
        elif self.is_trained(name):
            self.job.skip(title, "it is trained")
        else:
            with self.job.stage(title):
                {"teacher": self._train_teacher, "stock": self._train_stock}.get(name, partial(self._distil, name))()

    def _stage(self, name: str, kind: training.Kind, **arguments: Any) -> Stage:
        """What every stage of training is given; `arguments` go before those of the settings."""
        section = self.settings.teacher if name == "teacher" else self.settings.student
        arguments = {**TRAINING, **self.base, **section.training, **arguments}
        evaluates = arguments.get("eval_strategy", "no") not in ("no", False)
        if evaluates and "dev" not in self.collection.splits:
            asked = f"training.eval_strategy is {arguments['eval_strategy']!r}"
            raise ValueError(f"{asked}, but {self.collection.name} has no dev split: name one with data.dev_split")
        evaluator = partial(training.dev_evaluator, self.collection, kind, bf16=arguments.get("bf16", False))
        return Stage(
            self.folder_of(name),
            self._work_of(name),
            settings=self.depends(name),
            arguments=arguments,
            make_evaluator=evaluator if evaluates else lambda: None,
            write=self.job.write,
        )

    def _new_colbert(self) -> MultiVectorEncoder:
        set_seed(self.of_teacher["seed"])
        if "teacher" in self.start:
            return MultiVectorEncoder(self.start["teacher"])
        encoder = self.settings.encoder
        how: dict[str, Any] = {"encoding": encoder.encoding, "prompts": encoder.prompts, **encoder.lengths}
        return build_colbert(resolve_model(encoder.base_model), dim=self.settings.teacher.dim, **how)

    def _train_teacher(self) -> None:
        scale = read_training_scale(self.start["teacher"]) if "teacher" in self.start else None
        stage = self._stage("teacher", "late interaction", seed=self.of_teacher["seed"])
        training.train_colbert(stage, self._new_colbert, partial(self.rows_of, "teacher"), scale=scale)

    def _train_stock(self) -> None:
        own = self.settings.student
        encoder = replace(self.settings.encoder, encoding="own")
        student = StudentSettings(kind="dense", initialise_from="base", layers=own.layers)
        make: Any = partial(new_student, encoder, student, None)
        if own.kind == "static":
            make = partial(self._begin, replace(own, initialise_from="base", tower_of=None))
        training.train_stock(self._stage("stock", "dense"), make, partial(self.rows_of, "stock"))

    def _distil(self, name: str) -> None:
        if not (own := self.settings.student).is_coupled:
            return finish_tower(self, name, own, partial(self._new_student, own))
        if self.has_own_teacher and not self.folder_of("teacher").is_dir():
            raise SettingsError(
                f"stages: the student learns from {self.teacher_model}, which is not there. Add the stage teacher, or "
                "name a trained ColBERT with --teacher.model."
            )
        with self.job.state.main_process_first():
            student, teaching, candidates = prepare(self, name)
        training.train_student(
            self._stage(name, self.kind, **student.training),
            partial(self._begin, student),
            partial(make_teacher, self, teaching, student),
            partial(self.rows_of, name, candidates),
            schedules=self.schedules,
        )

    def _begin(self, student: StudentSettings) -> Any:
        if "student" in self.start:
            return SentenceTransformer(self.start["student"])
        return begin(self, student, partial(self._new_student, student))

    def _new_student(self, student: StudentSettings) -> Any:
        if student.kind == "static":
            return SentenceTransformer(str(self._untrained(student)))
        return new_student(self.settings.encoder, student, self.teacher_model)

    def _untrained(self, student: StudentSettings) -> Path:
        """The folder of a static student before training."""
        stays = student.stays and (weights_file_digest(student.stays) or student.stays)
        start = stays or self.settings.encoder.starts_from(student.initialise_from)
        made_of = {**self.of_teacher, "start": start, "dim": student.dim}
        parts = (self.settings.encoder, student, self.teacher_model, self.collection.corpus)
        return prepared("untrained", made_of, lambda out: new_student(*parts).save_pretrained(str(out)), self.shared)

    @property
    def shared(self) -> Path:
        """The folder of what runs of one comparison make once for all of them."""
        return self.vectors.parent if self.vectors else self.folder

    @property
    def passage_folders(self) -> list[Path]:
        """Folders of the vectors of passages that its query towers were made for."""
        given = [Path(self.settings.student.passages)] if self.settings.student.passages else []
        return [one for one in (*given, *self.shared.glob("passages/*")) if (one / MANIFEST_FILE).is_file()]

    @property
    def vectors_folder(self) -> str | None:
        """Where a teacher's vectors are kept; those of a mixture, which every step reads, are kept always."""
        if self.settings.student.teacher_cache is not None or not self.settings.teacher.is_mixture:
            return self.settings.student.teacher_cache
        return str(self.vectors or self.folder / "vectors")

    def report(self) -> str:
        """Search with every system and compare them; the report, Markdown, is also in the output folder."""
        settings = self.settings
        models = {name: str(folder) for name, folder in self.students.items()}
        for name, folder in models.items():
            if not Path(folder).is_dir():
                raise SettingsError(f"stages: {folder} is not there to be evaluated. Add the stage {name}.")
        stock = models.pop("stock", None)
        if "unlabelled" in models:
            models = {"unlabelled": models["unlabelled"], "labelled": models["student"]}
        if settings.student.kind == "static" and settings.student.tower_of is None:
            models = {"untrained": str(self._untrained(settings.student)), **models}
        colbert, (depends, names) = settings.teacher.kind == "colbert", self.of_runs()
        quick_report(
            self.collection,
            self.folder,
            # The base of a ColBERT from elsewhere is not known.
            base_model=None if colbert and settings.teacher.model else settings.encoder.base_model,
            students=models,
            stock=stock,
            teacher=self.teacher_model if colbert else None,
            settings=depends,
            names=names,
            bf16=self.base["bf16"],
            lengths=settings.encoder.lengths,
            prompts=settings.encoder.prompts,
            vectors=self.vectors_folder,
            dims=settings.student.training.get("matryoshka_dims"),
            labels=settings.data.labels > 0,
            stored=self.passage_folders,
            **asdict(settings.evaluation) | {"codes": settings.codes},
        )
        return (self.folder / "report.md").read_text(encoding="utf-8")
