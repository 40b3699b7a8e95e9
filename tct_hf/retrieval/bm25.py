"""Lexical retrieval: BM25 over an inverted index of precomputed scores."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.data.ids import is_utf8
from tct_hf.retrieval.runs import Run

if TYPE_CHECKING:
    import numpy as np

    from tct_hf.retrieval.hub_indexes import PushedIndex

# Tuned for MS MARCO passages, and for those with 40 generated queries each.
PASSAGE_K1, PASSAGE_B = 0.82, 0.68
EXPANDED_K1, EXPANDED_B = 2.18, 0.86
METHODS = ("lucene", "robertson", "atire")
_TOKEN = re.compile(r"(?u)\b\w\w+\b")
_SETTINGS_FILE = "tct_bm25.json"
_IDS_FILE = "ids.json"
_FORMAT = 3


class BM25Index:
    """A BM25 index that answers queries with passage ids and scores; make one with `build` or `load`.

    Equal scores are ordered by passage id, so that a run does not depend on the order of the corpus.
    """

    def __init__(self, engine: Any, ids: list[str], settings: dict[str, Any]) -> None:
        self._engine = engine
        self.ids = ids
        self.settings = settings
        self._analyse = _analyser(settings["language"], settings["stemmer"])
        self._idf: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        ids: Iterable[str],
        *,
        k1: float | None = None,
        b: float | None = None,
        method: str = "lucene",
        language: str = "english",
        stemmer: str | None = "english",
        backend: str = "numba",
        expansion: Mapping[str, Any] | None = None,
    ) -> BM25Index:
        """Index passages.

        Args:
            texts: the passages, read once.
            ids: their ids, as many, each once.
            k1: term frequency saturation; None: 0.82 or, of expanded passages, 2.18, tuned on MS MARCO.
            b: length normalisation, 0 to 1; None: 0.68 or, of expanded passages, 0.86.
            method: "lucene", "robertson" or "atire", the variants of Kamphuis et al., ECIR 2020. A word in half of
                the passages or more counts nothing under "robertson", a word in all of them nothing under "atire":
                in a small or narrow collection they find less than "lucene".
            language: stop word list, a language bm25s knows, or "none".
            stemmer: Snowball language of PyStemmer, or None for whole words.
            backend: "numba", or "numpy" (about 100 times slower, needs no compiler).
            expansion: what the texts hold beside the passages, JSON-ready, kept with the index; `expanded_bm25` makes
                both.

        Returns:
            The index.

        Raises:
            ValueError: a setting out of range, unequal counts, a repeated id, no passage, or no token at all.
            ImportError: the backend or the stemmer is not installed; the message says what to install.
        """
        import bm25s

        if method not in METHODS:
            raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")
        k1 = k1 if k1 is not None else EXPANDED_K1 if expansion else PASSAGE_K1
        b = b if b is not None else EXPANDED_B if expansion else PASSAGE_B
        if not 0 <= k1 < math.inf or not 0 <= b <= 1:
            raise ValueError(f"k1={k1}, b={b}: k1 must be finite and 0 or more, and b between 0 and 1")
        _check_backend(backend)
        settings: dict[str, Any] = {"k1": k1, "b": b, "method": method}
        settings |= {"language": language, "stemmer": stemmer, "backend": backend}
        if expansion:
            settings["expansion"] = dict(expansion)
        analyse = _analyser(language, stemmer)
        vocabulary: dict[str, int] = {}
        tokens = []
        for text in texts:
            # Four bytes a token: a list of int objects takes several times that.
            tokens.append(array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in analyse(text)]))
        id_list = list(ids)
        check_ids(id_list, len(tokens), "texts")
        if not vocabulary:
            raise ValueError("texts: no passage has a word to index; check the text column, language and stemmer")
        settings["average_length"] = sum(map(len, tokens)) / len(tokens)
        engine = bm25s.BM25(k1=k1, b=b, method=method, backend=backend)
        engine.index((tokens, vocabulary), create_empty_token=False, show_progress=False)
        return cls(engine, id_list, settings)

    def search(
        self, queries: Sequence[str] | Mapping[str, str], k: int = 100
    ) -> tuple[list[list[str]], list[np.ndarray]]:
        """Find the best passages of each query.

        Args:
            queries: query texts, or {query id: text} whose order the result follows.
            k: passages a query, at most; passages without any query word are never returned.

        Returns:
            Ids and float32 scores, one list and one array a query, best first; empty for a query without a known
            word.

        Raises:
            ValueError: k is below 1.
        """
        rows, scores = self.search_rows(queries, k)
        return [[self.ids[row] for row in found] for found in rows], scores

    def run(self, queries: Mapping[str, str], k: int = 100) -> Run:
        """Search and return a run.

        Args:
            queries: query id to text.
            k: passages a query, at most.

        Returns:
            Query id to passage id to score; every query has an entry, if an empty one.
        """
        ids, scores = self.search(queries, k)
        return {
            query_id: dict(zip(found, values.tolist(), strict=True))
            for query_id, found, values in zip(queries, ids, scores, strict=True)
        }

    def search_rows(
        self, queries: Sequence[str] | Mapping[str, str], k: int = 100
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Like `search`, with the passages' row numbers in place of their ids."""
        import numpy as np

        if k < 1:
            raise ValueError(f"k: {k} is below 1; ask for at least one passage")
        if isinstance(queries, str):
            raise ValueError("queries: one string; pass a list of query texts or {query id: text}")
        texts = list(queries.values()) if isinstance(queries, Mapping) else list(queries)
        tokens = [self.known_words(text) for text in texts]
        rows: list[np.ndarray] = [np.empty(0, np.int64) for _ in texts]
        scores: list[np.ndarray] = [np.empty(0, np.float32) for _ in texts]
        answerable = [at for at, words in enumerate(tokens) if words]
        # One more than asked for shows whether equal scores straddle the cut.
        depth = min(k + 1, len(self.ids))
        batch = max(1, 4_000_000 // depth)
        for start in range(0, len(answerable), batch):
            part = answerable[start : start + batch]
            found, values = self._engine.retrieve(
                [tokens[at] for at in part], k=depth, show_progress=False, n_threads=0, sorted=True
            )
            for at, hits, hit_scores in zip(part, found, values, strict=True):
                rows[at], scores[at] = self._best(tokens[at], hits.astype(np.int64), hit_scores, k)
        return rows, scores

    def known_words(self, text: str) -> list[int]:
        """The numbers of a query's words in the vocabulary, each as often as it comes; other words are left out."""
        vocabulary = self._engine.vocab_dict
        return [vocabulary[word] for word in self._analyse(text) if word in vocabulary]

    def weigh(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """What each word of a passage adds to a query's score, whether the passage is in the index or not.

        Args:
            text: the passage.

        Returns:
            `(words,)` int32, the numbers of its known words, each once, and their float32 weights. A passage's score
            is the sum of the weights of the query's words, of :meth:`known_words`.
        """
        import numpy as np

        words = self._analyse(text)
        counts = Counter(self._engine.vocab_dict.get(word, -1) for word in words)
        counts.pop(-1, None)
        numbers = np.fromiter(counts, np.int32, len(counts))
        frequencies = np.fromiter(counts.values(), np.float64, len(counts))
        k1, b, method = (self.settings[name] for name in ("k1", "b", "method"))
        length = k1 * (1 - b + b * len(words) / self.settings["average_length"])
        weights = self._idfs()[numbers] * frequencies / (frequencies + length)
        return numbers, (weights * (k1 + 1) if method == "atire" else weights).astype(np.float32)

    def _idfs(self) -> np.ndarray:
        """`(vocabulary,)`: the inverse document frequencies of Kamphuis et al., ECIR 2020."""
        import numpy as np

        if self._idf is None:
            passages, holders = len(self), np.diff(self._engine.scores["indptr"])
            odds = (passages - holders + 0.5) / (holders + 0.5)
            self._idf = np.log(
                {"lucene": 1 + odds, "robertson": np.maximum(odds, 1), "atire": passages / holders}[
                    self.settings["method"]
                ]
            )
        return self._idf

    def _best(self, tokens: list[int], rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        if len(scores) > k and scores[k] == scores[k - 1] and scores[k] > 0:
            # The engine kept any of the equals: take them all and let the ids decide.
            everything = self._engine.get_scores_from_ids(tokens)
            rows = np.flatnonzero(everything >= scores[k - 1])
            scores = everything[rows]
        positive = scores > 0
        rows, scores = rows[positive], scores[positive]
        order = sorted(range(len(rows)), key=lambda at: (-scores[at], self.ids[rows[at]]))[:k]
        return rows[order], scores[order].astype(np.float32)

    def save(self, directory: str | Path) -> None:
        """Write the index to a folder; an index that is there is replaced whole.

        Args:
            directory: the folder.

        Raises:
            OSError: it can't be written.
        """
        from tct_hf.retrieval.storage import write_directory

        def fill(staging: Path) -> None:
            self._engine.save(staging, show_progress=False)
            (staging / _IDS_FILE).write_text(json.dumps(self.ids, ensure_ascii=False), encoding="utf-8")

        settings = {"format": _FORMAT, "passages": len(self.ids), **self.settings}
        write_directory(directory, fill, _SETTINGS_FILE, settings)

    @classmethod
    def load(
        cls, directory: str | Path, *, mmap: bool = False, verify: bool = True, backend: str | None = None
    ) -> BM25Index:
        """Open an index that `save` wrote.

        Args:
            directory: the folder.
            mmap: leave the posting lists on disk and map them.
            verify: compare the files' checksums, which reads each once; their sizes are always compared.
            backend: "numba" or "numpy" in place of the saved one.

        Returns:
            The index.

        Raises:
            FileNotFoundError: there is no such index.
            ValueError: it was written by another version, or a file is missing, truncated or altered.
        """
        import bm25s

        from tct_hf.retrieval.storage import read_settings

        directory = Path(directory)
        settings = read_settings(directory, _SETTINGS_FILE, _FORMAT, "BM25 index", verify=verify)
        passages = settings.pop("passages")
        settings["backend"] = backend or settings["backend"]
        _check_backend(settings["backend"])
        try:
            engine = bm25s.BM25.load(directory, mmap=mmap, show_progress=False, backend=settings["backend"])
            ids = json.loads((directory / _IDS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{directory}: damaged BM25 index ({error}); build and save it again") from error
        if len(ids) != passages or engine.scores["num_docs"] != passages:
            raise ValueError(
                f"{directory}: {len(ids)} ids and {engine.scores['num_docs']} indexed passages where {passages} "
                "are announced; build and save the index again"
            )
        return cls(engine, ids, settings)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str,
        license_note: str | None = None,
        passages: str | None = None,
        private: bool | None = None,
        revision: str = "main",
        tag: str | None = None,
        token: str | None = None,
    ) -> PushedIndex:
        """Push the index to a dataset repository: files, manifest and a card.

        Args:
            repo_id: owner/name; made when missing.
            license: identifier of the Hub's list; that of the passages.
            license_note: what a reader must know of it.
            passages: where the texts are, for the card, such as the Hub id of a data set.
            private: of a repository that is made; None: the account's setting.
            revision: branch to push to; made when missing.
            tag: name for the commit; a tag never moves.
            token: of the Hub; the one logged in with when None.

        Returns:
            Repository, URL, commit and what was sent.

        Raises:
            ValueError: no licence, or a tag that is taken.
            HubError: the Hub refused or could not be reached.
        """
        from tct_hf.retrieval.hub_indexes import push_sparse

        return push_sparse(
            self,
            repo_id,
            license=license,
            license_note=license_note,
            passages=passages,
            private=private,
            revision=revision,
            tag=tag,
            token=token,
        )

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        mmap: bool = False,
        verify: bool = True,
        backend: str | None = None,
    ) -> BM25Index:
        """Download and open an index that `push_to_hub` pushed.

        Args:
            repo_id: the dataset repository.
            revision: branch, tag or commit.
            token: of the Hub; the one logged in with when None.
            mmap: as in `load`.
            verify: as in `load`.
            backend: as in `load`.

        Raises:
            HubError: the repository can't be had.
            ValueError: as `load`.
            FileNotFoundError: the repository holds no BM25 index.
        """
        from tct_hf.retrieval.hub_indexes import fetch_index

        folder = fetch_index(repo_id, revision=revision, token=token)
        return cls.load(folder, mmap=mmap, verify=verify, backend=backend)


def check_ids(ids: Sequence[str], count: int, what: str) -> None:
    """Refuse ids that do not name `count` things one by one.

    Args:
        ids: passage ids.
        count: how many there must be, at least one.
        what: the argument they name, for the message.

    Raises:
        ValueError: another count, no id, one that is not a string or can't be written as UTF-8, or one that comes
            twice.
    """
    if len(ids) != count:
        raise ValueError(f"ids: {len(ids)} ids for {count} {what}; pass one id for each")
    if not count:
        raise ValueError(f"{what}: nothing to index; pass at least one passage")
    seen: set[str] = set()
    for at, passage_id in enumerate(ids):
        if not isinstance(passage_id, str):
            raise ValueError(f"ids: number {at} is {passage_id!r}, not a string; convert ids with str")
        if not is_utf8(passage_id):
            raise ValueError(
                f"ids: {passage_id!r} (number {at}) has a lone surrogate, which no file can hold as UTF-8; rename it"
            )
        if passage_id in seen:
            raise ValueError(f"ids: {passage_id!r} comes twice (again at number {at}); make ids unique")
        seen.add(passage_id)


def _check_backend(backend: str) -> None:
    if backend not in ("numba", "numpy"):
        raise ValueError(f'backend: {backend!r} is neither "numba" nor "numpy"')
    if backend == "numba":
        try:
            import numba  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"backend: numba can't be imported ({error}); install it with `pip install numba`, "
                'or pass backend="numpy" (about 100 times slower)'
            ) from error
        _keep_compiled()


@cache
def _keep_compiled() -> None:
    """Have numba keep what it compiles on disk: bm25s's search takes 10 s to compile, in every process anew."""
    from bm25s.numba import retrieve_utils
    from numba.core.dispatcher import Dispatcher

    for function in vars(retrieve_utils).values():
        if isinstance(function, Dispatcher):
            try:
                function.enable_caching()
            except RuntimeError:  # no folder that numba may write to: compiled in this process alone
                return


def _analyser(language: str, stemmer: str | None) -> Callable[[str], list[str]]:
    """Make the function from text to terms: lower case, words of two characters and more, stop words out, stems."""
    from bm25s.tokenization import _infer_stopwords

    try:
        stop_words = frozenset() if language == "none" else frozenset(_infer_stopwords(language))
    except ValueError as error:
        raise ValueError(f'language: no stop words for {language!r} ({error}); pass language="none"') from error
    if stemmer is None:
        return lambda text: [word for word in _TOKEN.findall(text.lower()) if word not in stop_words]
    try:
        import Stemmer
    except ImportError as error:
        raise ImportError(
            f"stemmer: PyStemmer can't be imported ({error}); `pip install PyStemmer` or pass stemmer=None"
        ) from error
    try:
        snowball = Stemmer.Stemmer(stemmer)
    except KeyError:
        raise ValueError(f"stemmer: {stemmer!r} is not one of {', '.join(Stemmer.algorithms())}") from None
    stem: dict[str, str] = {}

    def analyse(text: str) -> list[str]:
        words = [word for word in _TOKEN.findall(text.lower()) if word not in stop_words]
        for word in words:
            if word not in stem:
                stem[word] = snowball.stemWord(word)
        return [stem[word] for word in words]

    return analyse
