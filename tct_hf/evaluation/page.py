"""A page to search in a browser: what BM25, the student, both fused and the teacher find, side by side."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tct_hf.evaluation.marks import Match, matching_tokens, matching_words
from tct_hf.evaluation.searcher import Answer, Hit, Searcher
from tct_hf.evaluation.tables import milliseconds
from tct_hf.evaluation.workspace import OWN

if TYPE_CHECKING:
    from fastapi import FastAPI

TITLES = {"bm25": "BM25", "sparse": "Sparse student", "dense": "Student", "fused": "Hybrid", "maxsim": "Teacher"}
MOST = 50  # passages of a system
RERANKED = 20  # of a page: the teacher encodes them for every question
_LONGEST = 4000  # characters of a passage that are shown

# Colours are those of Gradio's theme, light and dark.
_CSS = """
.gradio-container { max-width: 110rem !important;
  --quiet: color-mix(in srgb, var(--body-text-color) 68%, transparent); }
.html-container { padding: 0 !important; }
footer { display: none !important; }
.found { display: grid; gap: .9rem 1.4rem; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr);
  grid-template-rows: auto repeat(var(--rows), auto); font-size: .9rem; line-height: 1.45; }
.found section { display: grid; grid-row: 1 / -1; grid-template-rows: subgrid; align-items: start; min-width: 0; }
.found header { border-bottom: 2px solid var(--border-color-primary); padding-bottom: .4rem; height: 100%; }
.found h2 { display: flex; justify-content: space-between; align-items: baseline; font-size: 1.1rem; margin: 0; }
.found h2 span, .found header p, .found .name span, .found .other, .legend { color: var(--quiet); font-size: .8rem; }
.found h2 span { font-weight: normal; }
.found h2 span, .found .other span { white-space: nowrap; }
.found header p, .found .other { margin: .15rem 0 0; overflow-wrap: anywhere; }
.found .other { font-size: .75rem; }
.found article { min-width: 0; overflow-wrap: anywhere; }
.found .name { display: flex; gap: .5rem; align-items: baseline; margin-bottom: .2rem; }
.found .name code { flex: 1; font-size: .8rem; font-weight: 600; background: none; padding: 0; border: 0; }
.found .name b, .found .other { font-variant-numeric: tabular-nums; }
.found summary { cursor: pointer; list-style: none; white-space: pre-line; }
.found summary::-webkit-details-marker { display: none; }
.found details:not([open]) summary { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 6;
  overflow: hidden; }
.found mark, .legend mark { color: inherit; border-radius: .2em;
  background: color-mix(in srgb, #f59e0b calc(var(--by) * 1%), transparent); }
.found u, .legend u { font-weight: 600; text-decoration: underline .12em #3b82f6; text-underline-offset: .2em; }
.legend { margin: 0 0 1rem; }
.note { padding: 1.5rem 0; color: var(--quiet); }
.problem { padding: .6rem .8rem; border-left: 4px solid #dc2626; background: var(--background-fill-secondary); }
@media (max-width: 60rem) {
  .found { display: block; }
  .found section { display: block; margin-bottom: 1.5rem; }
  .found .other { font-size: .75rem; }
.found article { margin-top: .75rem; }
}
"""


@dataclass(frozen=True)
class Page:
    """What a page shows: a searcher, the questions to begin with, and a line on each system, by its key."""

    searcher: Searcher
    title: str
    examples: Sequence[str] = ()
    about: Mapping[str, str] | None = None
    k: int = 5

    def json(self, question: str, k: int | None = None) -> dict[str, Any]:
        """The passages of every system with their scores, and the milliseconds that each takes."""
        answer = self._answer(question, k)
        return {
            "question": question,
            "milliseconds": {name: round(1000 * seconds, 2) for name, seconds in answer.seconds.items()},
            "passages": {name: [asdict(hit) for hit in hits] for name, hits in answer.hits.items()},
        }

    def html(self, question: str) -> str:
        """The columns of an answer, or what is wrong; no text in it is read as HTML."""
        if not question.strip():
            return '<p class="note">Type a question to see what each system finds, side by side.</p>'
        try:
            answer = self._answer(question, None)
        except (OSError, ValueError) as error:
            return f'<p class="problem">{escape(str(error))}</p>'
        texts = {hit.id: hit.text[:_LONGEST] for hits in answer.hits.values() for hit in hits}
        marked = dict(zip(texts, self._marked(question, list(texts.values())), strict=True))
        columns = "".join(self._column(name, answer, marked) for name in answer.hits)
        teacher = "maxsim" in answer.hits
        shaded = (
            '<mark style="--by: 50">Shaded</mark>: what the teacher finds most similar to a token of the question, '
            "darker where more similar. "
        )
        legend = f"<u>Underlined</u>: a word of the question. {shaded if teacher else ''}A passage opens when clicked."
        return f'<p class="legend">{legend}</p><div class="found" style="--rows: {self.k}">{columns}</div>'

    def _answer(self, question: str, k: int | None) -> Answer:
        k = self.k if k is None else k
        if k > max(MOST, self.k):
            raise ValueError(f"k: {k} is above {max(MOST, self.k)}; ask for fewer passages")
        with _MODEL:
            return self.searcher.answer(question, k)

    def _marked(self, question: str, texts: list[str]) -> list[str]:
        model, words = self.searcher.reranker, self.searcher.collection.words
        with _MODEL:
            tokens = matching_tokens(model, question, texts) if model is not None and texts else [[]] * len(texts)
        return [
            marked(text, matching_words(question, text, words), found)
            for text, found in zip(texts, tokens, strict=True)
        ]

    def _column(self, name: str, answer: Answer, texts: Mapping[str, str]) -> str:
        hits = answer.hits[name]
        about = (self.about or {}).get(name, "")
        head = (
            f"<header><h2>{TITLES[name]}<span>{_duration(answer.seconds[name])}</span></h2>"
            f"<p>{escape(about)}</p></header>"
        )
        found = "".join(_article(name, hit, texts[hit.id], list(answer.hits)) for hit in hits)
        return f"<section>{head}{found or '<p class=note>No passage has a word of the question.</p>'}</section>"


def page_of(searcher: Searcher, reranker: str | None, k: int) -> Page:
    """The page of a searcher, beginning with questions of its collection; `reranker` is a name."""
    collection, names = searcher.collection, searcher.names
    splits = (collection.splits.get(use) for use in ("test", "dev", "train"))
    queries = next((split.queries for split in splits if split is not None), collection.questions)
    teacher = names.get("dense") if reranker == OWN else reranker
    about = {
        "bm25": f"words of {len(collection.corpus):,} passages",
        **names,
        "fused": searcher.fusion,
        "maxsim": f"MaxSim of {teacher}, over the best {searcher.reranked} of the hybrid",
    }
    return Page(searcher, f"Search {short_name(collection.name)}", list(islice(queries.values(), 4)), about, k)


def short_name(name: str) -> str:
    """A collection's name, of a folder its last part."""
    return Path(name).name if Path(name).exists() else name


_MODEL = threading.Lock()  # a tokenizer can't be used by two threads at once


def _article(system: str, hit: Hit, text: str, systems: Sequence[str]) -> str:
    """A passage with its score, and below it those of the other systems."""
    figures = {TITLES[name]: _figure(getattr(hit, name)) for name in systems if name != system}
    others = " · ".join(f"<span>{name} {figure}</span>" for name, figure in figures.items())
    name = re.sub(r"([._/])", r"\1<wbr>", escape(hit.id))
    more = " …" if len(hit.text) > _LONGEST else ""
    return (
        f'<article><div class="name"><span>{hit.rank}</span><code>{name}</code>'
        f"<b>{_figure(getattr(hit, system))}</b></div><details><summary>{text}{more}</summary></details>"
        f'<p class="other">{others}</p></article>'
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{milliseconds(1000 * seconds)} ms"


def _figure(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}" if abs(score) < 10 else f"{score:.1f}"


def marked(text: str, words: Sequence[tuple[int, int]], tokens: Sequence[Match]) -> str:
    """A text as HTML, its words underlined and its tokens shaded; the text itself is escaped."""
    edges = sorted(
        {0, len(text), *(edge for span in words for edge in span)} | {e for t in tokens for e in (t.start, t.end)}
    )
    pieces = []
    for start, end in pairwise(edges):
        piece = escape(text[start:end])
        if any(first <= start < last for first, last in words):
            piece = f"<u>{piece}</u>"
        if match := next((token for token in tokens if token.start <= start < token.end), None):
            # From .2, where tokens have nothing in common, to 1.
            by = round(70 * min(1.0, max(0.0, (match.similarity - 0.2) / 0.7)))
            title = escape(f"{match.of}: {match.similarity:.2f}")
            piece = f'<mark style="--by: {by}" title="{title}">{piece}</mark>'
        pieces.append(piece)
    return "".join(pieces)


def page_app(page: Page, *, local: bool = True) -> FastAPI:
    """The page at `/` and its JSON at `/search?q=...&k=5`; `local` refuses the names of other machines.

    Nothing is asked of another machine: no analytics, no fonts, no scripts from elsewhere.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
        from fastapi import FastAPI, HTTPException
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as error:
        raise ImportError(f"The page needs gradio ({error}): pip install 'tct_hf[demo]'.") from error

    app = FastAPI(title=page.title, docs_url=None, redoc_url=None)
    if local:  # or a page elsewhere could read the answers under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @app.get("/search")
    def search(q: str, k: int = page.k) -> dict[str, Any]:
        try:
            return page.json(q, k)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    with gr.Blocks(title=page.title, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {page.title}")
        question = gr.Textbox(
            placeholder="Ask a question", show_label=False, submit_btn="Search", autofocus=True, max_length=2000
        )
        if page.examples:
            examples = gr.Examples([[example] for example in page.examples], question, label="For instance")
        found = gr.HTML(page.html(""))
        question.submit(page.html, question, found, api_visibility="private", show_progress="minimal")
        if page.examples:
            examples.load_input_event.then(page.html, question, found, api_visibility="private")
    blocks.queue(api_open=False)
    return gr.mount_gradio_app(
        app, blocks, path="/", css=_CSS, theme=gr.themes.Default(**fonts), footer_links=[], run_history=False,
        ssr_mode=False, mcp_server=False,
    )  # fmt: skip


def serve(page: Page, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve a page until it is interrupted; port 0 takes any that is free."""
    app = page_app(page, local=_is_loopback(host))
    import uvicorn

    try:
        listening = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        why = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise ValueError(f"host, port: {host}:{port} can't be used ({why}); --port 0 takes a free one") from error
    with listening:
        tell(f"search at http://{host}:{listening.getsockname()[1]} (JSON: /search?q=...); Ctrl-C ends it")
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
