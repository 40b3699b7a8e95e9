"""Lexical retrieval: BM25 over passages, or over passages with the queries that were generated for them."""

from __future__ import annotations

import math
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tct_hf.data import shards
from tct_hf.data.expansion import SCORES_FOLDER, expanded_texts, load_expansions
from tct_hf.data.rows import checked_texts, each_checked
from tct_hf.files import file_digest
from tct_hf.retrieval.checks import check_ids, check_k, check_lists
from tct_hf.retrieval.index import Index, as_run, best_first
from tct_hf.retrieval.runs import Run
from tct_hf.retrieval.words import LANGUAGE, STEMMER, analyser, stemmer_of

if TYPE_CHECKING:
    from datasets import Dataset

# Tuned for MS MARCO passages, and for those with 40 generated queries each.
PASSAGE_K1, PASSAGE_B = 0.82, 0.68
EXPANDED_K1, EXPANDED_B = 2.18, 0.86
# Of how many queries at once, at least, it is told that most find next to nothing: this share of their words is known.
_MANY_QUERIES, _HARDLY_ANY = 3, 0.25


class BM25Index(Index):
    """A BM25 index that answers queries with passage ids and scores; make one with `build` or `load`.

    Equal scores are ordered by passage id, so that a run does not depend on the order of the corpus.

    Attributes:
        ids: passage ids, one a row.
        settings: what it was built with: k1, b, method, language, stemmer, backend, average_length, expansion.
    """

    kind, title, tags = "BM25 index", "A BM25 index (bm25s)", ("bm25",)
    settings_file, format = "tct_bm25.json", 9

    def __init__(self, engine: Any, ids: list[str], settings: dict[str, Any]) -> None:
        self._engine = engine
        self.ids = ids
        self.settings = settings
        self._analyse = analyser(settings["language"], settings["stemmer"])
        self._has_warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._engine, self.ids, self.settings)  # an analyser is made again

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        ids: Iterable[str],
        *,
        k1: float | None = None,
        b: float | None = None,
        language: str = LANGUAGE,
        stemmer: str | None = STEMMER,
        backend: str = "numba",
        expansion: Mapping[str, Any] | None = None,
    ) -> BM25Index:
        """Index passages.

        Args:
            texts: the passages, read once.
            ids: their ids, as many, each once.
            k1: term frequency saturation; None: 0.82 or, of expanded passages, 2.18, tuned on MS MARCO.
            b: length normalisation, 0 to 1; None: 0.68 or, of expanded passages, 0.86.
            language: stop word list, a language bm25s or PyStemmer knows, or "none". Chinese, Japanese, Thai and
                others that are written without spaces are indexed by letters and pairs of letters, whatever it is.
            stemmer: Snowball language of PyStemmer; "auto": that of `language`, if any (English with "none"); or None
                for whole words.
            backend: "numba", or "numpy" (about 100 times slower, needs no compiler).
            expansion: what the texts hold beside the passages, JSON-ready; `expanded_bm25` gives both.

        Raises:
            ValueError: a setting out of range, unequal counts, a repeated id, no passage, or no token at all.
        """
        import bm25s  # and with it numba: a second, which the help of recipes has not

        k1 = k1 if k1 is not None else EXPANDED_K1 if expansion else PASSAGE_K1
        b = b if b is not None else EXPANDED_B if expansion else PASSAGE_B
        settings: dict[str, Any] = {"k1": k1, "b": b, "method": "lucene"}
        settings |= {"language": language, "stemmer": stemmer_of(language, stemmer), "backend": backend}
        if expansion:
            settings["expansion"] = dict(expansion)
        _check_settings(settings)
        _keep_compiled()
        analyse = analyser(language, stemmer)
        vocabulary: dict[str, int] = {}
        tokens = []
        for text in each_checked(texts, "texts"):
            # Four bytes a token: a list of int objects takes several times that.
            tokens.append(array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in analyse(text)]))
        id_list = list(ids)
        check_ids(id_list, len(tokens), "texts")
        if not vocabulary:
            raise ValueError("texts: no passage has a word to index; check the text column, language and stemmer")
        settings["average_length"] = sum(map(len, tokens)) / len(tokens)
        engine = bm25s.BM25(k1=k1, b=b, method="lucene", backend=backend)
        engine.index((tokens, vocabulary), create_empty_token=False, show_progress=False)
        return cls(engine, id_list, settings)

    def search(self, queries: Sequence[str], k: int = 100) -> tuple[list[list[str]], list[np.ndarray]]:
        """Find the best passages of each query.

        Args:
            queries: query texts.
            k: passages a query, at most; passages without any query word are never returned.

        Returns:
            Ids and float32 scores, one list and one array a query, best first; empty for a query without a known
            word.

        Raises:
            ValueError: k is below 1, queries are one string or a mapping, or one is no text.
        """
        k = check_k(k)
        words = [self._analyse(text) for text in checked_texts(queries, "queries")]
        tokens = [self._numbers(asked) for asked in words]
        ids: list[list[str]] = [[] for _ in tokens]
        scores: list[np.ndarray] = [np.empty(0, np.float32) for _ in tokens]
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
                ids[at], scores[at] = self._best(tokens[at], hits.astype(np.int64), hit_scores, k)
        counts = zip(map(len, tokens), map(len, words), strict=True)
        self._warn_of_little([known <= _HARDLY_ANY * asked for known, asked in counts])
        return ids, scores

    def _warn_of_little(self, lacks: Sequence[bool]) -> None:
        """Say once that the passages have hardly a word of most queries of a search."""
        if self._has_warned or len(lacks) < _MANY_QUERIES or sum(lacks) <= len(lacks) / 2:
            return
        self._has_warned = True
        language, stemmer = self.settings["language"], self.settings["stemmer"]
        warnings.warn(
            f"BM25 finds next to nothing for {sum(lacks)} of {len(lacks)} queries: they share hardly a word with the "
            f"passages. Check that both are in one language and name it: now language is {language!r} and stemmer "
            f"{stemmer!r} (data.language and data.stemmer of the recipes)",
            stacklevel=3,
        )

    def run(self, queries: Mapping[str, str], k: int = 100) -> Run:
        """Search queries, id to text, and return a run, in which every query has an entry."""
        if not isinstance(queries, Mapping):
            raise ValueError("queries must be a mapping {id: text}; for a list of texts use search()")
        return as_run(queries, *self.search(list(queries.values()), k))

    def known_words(self, text: str) -> list[int]:
        """The numbers of a query's words in the vocabulary, each as often as it comes; other words are left out."""
        return self._numbers(self._analyse(text))

    def _numbers(self, words: Iterable[str]) -> list[int]:
        vocabulary = self._engine.vocab_dict
        return [vocabulary[word] for word in words if word in vocabulary]

    def weigh(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """What each word of a passage adds to a query's score, whether the passage is in the index or not.

        Returns:
            `(words,)` int32, the numbers of its known words, each once, and their float32 weights. A passage's score
            is the sum of the weights of the query's words, of :meth:`known_words`.
        """
        words = self._analyse(text)
        counts = Counter(self._engine.vocab_dict.get(word, -1) for word in words)
        counts.pop(-1, None)
        numbers = np.fromiter(counts, np.int32, len(counts))
        frequencies = np.fromiter(counts.values(), np.float64, len(counts))
        k1, b = self.settings["k1"], self.settings["b"]
        length = k1 * (1 - b + b * len(words) / self.settings["average_length"])
        return numbers, (self._idf[numbers] * frequencies / (frequencies + length)).astype(np.float32)

    @cached_property
    def _idf(self) -> np.ndarray:
        """`(vocabulary,)`: the inverse document frequencies of Lucene, as in Kamphuis et al., ECIR 2020."""
        holders = np.diff(self._engine.scores["indptr"])
        return np.log(1 + (len(self) - holders + 0.5) / (holders + 0.5))

    def _best(self, tokens: list[int], rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[list[str], np.ndarray]:
        if len(scores) > k and scores[k] == scores[k - 1] and scores[k] > 0:
            # The engine kept any of the equals: take them all and let the ids decide.
            everything = self._engine.get_scores_from_ids(tokens)
            rows = np.flatnonzero(everything >= scores[k - 1])
            scores = everything[rows]
        found = scores > 0
        return best_first([self.ids[row] for row in rows[found]], scores[found].astype(np.float32), k)

    def _settings(self) -> dict[str, Any]:
        return self.settings

    def _write(self, folder: Path) -> None:
        self._engine.save(folder, show_progress=False)

    @classmethod
    def _open(cls, folder: Path, settings: dict[str, Any], ids: Any, *, mmap: bool, verify: bool) -> BM25Index:
        import bm25s

        _check_settings(settings)
        if not 0 < settings["average_length"] < math.inf:
            raise ValueError(f"average_length={settings['average_length']}: it must be finite and above 0")
        _keep_compiled()
        engine = bm25s.BM25.load(folder, mmap=mmap, show_progress=False, backend=settings["backend"])
        check_lists((np.asarray(engine.scores[name]) for name in ("data", "indices", "indptr")), len(ids), verify)
        if engine.scores["num_docs"] != len(ids):  # the size of the array that compiled search writes to
            raise ValueError(f"its arrays are not the lists of {len(ids)} passages")
        terms = len(engine.scores["indptr"]) - 1
        if not all(type(number) is int and 0 <= number < terms for number in engine.vocab_dict.values()):
            raise ValueError(f"a word of the vocabulary has a number beyond its {terms} terms")
        return cls(engine, ids.to_pylist(), settings)

    def _card(self) -> tuple[str, list[tuple[str, str]]]:
        expansion = self.settings.get("expansion") or {}
        rows = [(name, str(value)) for name, value in self.settings.items() if name != "expansion"]
        rows += [(f"expansion: {name}", str(value)) for name, value in expansion.items() if value not in (None, False)]
        return ", each with queries that were generated for it" if expansion else "", rows


def _check_settings(settings: Mapping[str, Any]) -> None:
    k1, b, backend = (settings[name] for name in ("k1", "b", "backend"))
    if not 0 <= k1 < math.inf or not 0 <= b <= 1:
        raise ValueError(f"k1={k1}, b={b}: k1 must be finite and 0 or more, and b between 0 and 1")
    if backend not in ("numba", "numpy"):
        raise ValueError(f'backend: {backend!r} is neither "numba" nor "numpy"')


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


def expanded_bm25(
    corpus: Dataset,
    expansions: str | Path,
    *,
    num_queries: int | None = None,
    drop_repeats: bool = False,
    drop_share: float = 0.0,
    k1: float = EXPANDED_K1,
    b: float = EXPANDED_B,
    **options: Any,
) -> BM25Index:
    """Index passages with their generated queries appended; the index says with which, under "expansion".

    Args:
        corpus: columns `id` and `text`.
        expansions: folder of `expand_corpus` or `write_expansions`, of this corpus.
        num_queries: the first so many queries of a passage; all when None.
        drop_repeats: leave out a query that equals an earlier one of its passage.
        drop_share: share of the queries to leave out by score, 0 to below 1.
        k1: term frequency saturation; 2.18 with b 0.86 is tuned for MS MARCO passages with 40 queries each.
        b: length normalisation, 0 to 1.
        **options: the rest of the arguments of `BM25Index.build`.

    Raises:
        FileNotFoundError: no finished folder of expansions.
        ValueError: as `load_expansions`, `expanded_texts` and `BM25Index.build`.
    """
    kept: dict[str, Any] = {"num_queries": num_queries, "drop_repeats": drop_repeats, "drop_share": drop_share}
    return BM25Index.build(
        expanded_texts(corpus, load_expansions(expansions), **kept),
        corpus["id"],
        k1=k1,
        b=b,
        expansion=describe_expansion(expansions, **kept),
        **options,
    )


def describe_expansion(
    expansions: str | Path, *, num_queries: int | None, drop_repeats: bool, drop_share: float
) -> dict[str, Any]:
    """What an expanded index is built over, JSON-ready; the arguments are those of :func:`expanded_bm25`."""
    folder = Path(expansions)
    manifest = shards.read_manifest(folder, "expansions")
    generated = manifest.get("num_queries")
    wanted = [count for count in (num_queries, generated) if isinstance(count, int)]
    scores_sha256 = None
    if drop_share:
        scores = folder / SCORES_FOLDER
        shards.read_manifest(scores, "scores")
        scores_sha256 = file_digest(scores / shards.MANIFEST_FILE)
    return {
        "model": manifest.get("model"),
        "num_queries": min(wanted, default=None),
        "drop_repeats": drop_repeats,
        "drop_share": drop_share,
        "queries_sha256": file_digest(folder / shards.MANIFEST_FILE),
        "scores_sha256": scores_sha256,
    }
