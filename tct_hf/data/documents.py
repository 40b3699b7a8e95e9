"""A folder of Markdown and text files as a corpus: a passage is a section, or a part of a long one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tct_hf.data.file_sources import Source
from tct_hf.data.rows import file_key, text_lines

_SUFFIXES = (".md", ".markdown", ".txt")
_WORDS = 150  # of a passage at most: many encoders read 256 tokens
_HEADING = re.compile(r"(#{1,6})\s+(.*?)(\s+#+)?\s*")
_FENCE = re.compile(r"\s*(`{3,}[^`]*$|~~~)")


def document_files(folder: Path) -> list[Path]:
    """The Markdown and text files of a folder and of those in it, hidden ones left out."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


class DocumentSource(Source):
    """The passages of a folder's documents: `_id` ("guide/install.md#2", from 1), `title` (headings) and `text`."""

    names, unit = ["_id", "title", "text"], "passage"

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, f"{folder} (its Markdown and text files)"
        self.key = ["documents", _WORDS, *map(file_key, document_files(folder))]

    def raw(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        for path in document_files(self.folder):
            name = path.relative_to(self.folder).as_posix()
            passages = [(title, text) for title, lines in _sections(path) for text in _parts(lines)]
            for at, (title, text) in enumerate(passages, 1):
                yield number, {"_id": f"{name}#{at}", "title": title, "text": text}
                number += 1


def _sections(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The headings that a section is under, the outermost first, and its lines; a text file is one section."""
    headings: list[str] = []
    lines: list[str] = []
    fenced, marked = False, path.suffix.lower() != ".txt"
    for _, line in text_lines(path):
        fenced ^= bool(_FENCE.match(line))
        heading = _HEADING.fullmatch(line) if marked and not fenced else None
        if heading is None:
            lines.append(line)
            continue
        yield ": ".join(filter(None, headings)), lines
        level, lines = len(heading[1]), []
        headings = [*headings[: level - 1], *[""] * (level - 1 - len(headings)), heading[2]]
    yield ": ".join(filter(None, headings)), lines


def _parts(lines: list[str]) -> Iterator[str]:
    """The text of a section in parts of whole paragraphs, as far as these are no longer than a part."""
    part: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        words = paragraph.split()
        pieces = [paragraph.strip()]
        if len(words) > _WORDS:
            pieces = [" ".join(words[at : at + _WORDS]) for at in range(0, len(words), _WORDS)]
        for piece in filter(None, pieces):
            if part and sum(len(one.split()) for one in part) + len(piece.split()) > _WORDS:
                yield "\n\n".join(part)
                part = []
            part.append(piece)
    if part:
        yield "\n\n".join(part)
