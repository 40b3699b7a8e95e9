"""What in a passage matches a question: the words that BM25 counts, and each token's best match by MaxSim."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tct_hf.data.near_duplicates import UNSPACED
from tct_hf.retrieval.words import LANGUAGE, STEMMER, analyser

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder

# Of scripts that are written without spaces, each letter is a term.
_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


@dataclass(frozen=True)
class Match:
    """Characters `start` to `end` of a passage, the part of the question that they match best, and how similar."""

    start: int
    end: int
    of: str
    similarity: float


def matching_words(question: str, text: str, words: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Where the words of a text are whose terms the question has; `words` are BM25's language and stemmer."""
    analyse = analyser(**{"language": LANGUAGE, "stemmer": STEMMER, **words})
    terms = set(analyse(question))
    return [word.span() for word in _WORD.finditer(text) if not terms.isdisjoint(analyse(word.group()))]


def matching_tokens(model: MultiVectorEncoder, question: str, texts: Sequence[str]) -> list[list[Match]]:
    """For each text the tokens that give its MaxSim: the most similar one to each token of the question.

    A match with a special token or punctuation is left out. Of several tokens of the question with one match, the most
    similar counts.
    """
    encode: Any = model.encode_query
    [query] = encode([question], output_value=None)
    asked = {row: question[start:end] for row, start, end in _placed(model, question, query)}
    vectors = query["token_embeddings"][list(asked)]
    found: list[list[Match]] = []
    encode = model.encode_document
    for text, passage in zip(texts, encode(list(texts), output_value=None), strict=True):
        places = {row: (start, end) for row, start, end in _placed(model, text, passage)}
        similar = vectors @ passage["token_embeddings"].T
        similarities, rows = similar.masked_fill(~passage["attention_mask"].bool(), -2.0).max(1)
        best: dict[int, Match] = {}
        for of, row, similarity in zip(asked.values(), rows.tolist(), similarities.tolist(), strict=True):
            if row in places and (row not in best or best[row].similarity < similarity):
                best[row] = Match(*places[row], of, similarity)
        found.append([best[row] for row in sorted(best)])
    return found


def _placed(model: MultiVectorEncoder, text: str, encoded: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """The rows of a text's own tokens among those of the model's input, with their characters."""
    ids = encoded["input_ids"].tolist()
    cut: Any = {"truncation": True, "max_length": len(ids)}
    plain: Any = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **cut)

    def common(at: int) -> int:
        pairs = enumerate(zip(ids[at:], plain["input_ids"], strict=False))
        return next(
            (count for count, (one, other) in pairs if one != other), min(len(ids) - at, len(plain["input_ids"]))
        )

    # A prompt and special tokens stand before them, the end may be cut.
    first = max(range(len(ids)), key=common, default=0)
    for row, (start, end) in zip(range(first, first + common(first)), plain["offset_mapping"], strict=False):
        if any(map(str.isalnum, text[start:end])):
            yield row, start, end
