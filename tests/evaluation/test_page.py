"""The page to search: what is marked, what is escaped, its JSON, and itself in a browser."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tct_hf.evaluation.marks import Match, matching_tokens, matching_words
from tct_hf.evaluation.page import Page, marked, page_app, page_of, serve
from tct_hf.evaluation.workspace import open_teacher
from tests.evaluation.test_searcher import make_searcher
from tests.searching import Material

EVIL = "<img src=x onerror=alert(1)> <script>alert(2)</script> ${alert(3)} {{value}} dense & 'retrieval'"


class _Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(material: Material) -> Page:
    """Of a collection with a passage that would be a program, and a long one."""
    collection = material.collection()
    rows = collection.corpus.to_list()
    rows[0]["text"], rows[1]["text"] = EVIL, "dense tokens " * 2000
    collection.corpus = type(collection.corpus).from_list(rows)
    collection.fingerprint = {**collection.fingerprint, "sha256": "of the page"}
    teacher = open_teacher(str(material.teacher))
    searcher = make_searcher(material, material.folder / "page", collection=collection, reranker=teacher, reranked=9)
    return page_of(searcher, "the teacher", 3)


# --- what is marked ---


def test_words_are_those_that_bm25_counts() -> None:
    def words(question: str, text: str, **how: Any) -> list[str]:
        return [text[start:end] for start, end in matching_words(question, text, how)]

    assert words("opening the files", "He opens the FILE, not a door.") == ["opens", "FILE"]
    assert words("opening the files", "He opens the file.", language="none", stemmer=None) == ["the"]
    assert words("检索", "密集检索") == ["检", "索"] and words("the", "the") == []


def test_tokens_are_the_ones_whose_similarity_makes_up_max_sim(material: Material) -> None:
    model = open_teacher(str(material.teacher))
    question, texts = "dense retrieval", ["a dense passage of tokens", "the teacher", "retrieval " * 90]
    for text, found in zip(texts, matching_tokens(model, question, texts), strict=True):
        [query], [passage] = model.encode_query([question]), model.encode_document([text])
        similar = torch.as_tensor(query) @ torch.as_tensor(passage).T
        assert found and found == sorted(found, key=lambda match: match.start)
        for match in found:
            assert text[match.start : match.end].strip() and match.of in question
            assert (similar.max(1).values - match.similarity).abs().min() < 1e-4


@given(st.text(alphabet="<>&\"'ab é{}$", max_size=40), st.data())
def test_marks_change_nothing_of_the_text_and_add_no_other_tag(text: str, data: Any) -> None:
    place = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(sorted)
    words = [tuple(span) for span in data.draw(st.lists(place, max_size=3))]
    tokens = [Match(*span, of='"><img>', similarity=0.5) for span in data.draw(st.lists(place, max_size=3))]
    read = _Tags(marked(text, words, tokens))  # type: ignore[arg-type]
    assert read.text == text and read.tags <= {"u", "mark"}


# --- the answers ---


def test_an_answer_has_what_each_system_finds_by_itself(page: Page) -> None:
    assert len(page.json("dense retrieval", 12)["passages"]["maxsim"]) == 9
    assert len(replace(page, k=60).json("dense retrieval")["passages"]["dense"])  # as many as it is to show
    answer = page.json("dense retrieval", 4)
    assert list(answer["passages"]) == list(answer["milliseconds"]) == ["bm25", "dense", "fused", "maxsim"]
    for system, found in answer["passages"].items():
        alone = page.searcher.ask("dense retrieval", 4, rank_by=system)
        assert [hit["id"] for hit in found] == [hit.id for hit in alone]
        assert [hit[system] for hit in found] == pytest.approx([getattr(hit, system) for hit in alone])
    assert answer["milliseconds"]["maxsim"] >= answer["milliseconds"]["fused"] > 0


def test_a_page_escapes_passages_questions_and_errors(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    read = _Tags(page.html(EVIL))
    assert EVIL in read.text and not read.tags & {"img", "script"}
    assert page.html(" ") == page.html("") and "Type a question" in page.html("")

    def fail(question: str, k: int) -> Any:
        raise ValueError(f"question: {EVIL}")

    monkeypatch.setattr(page.searcher, "answer", fail)
    assert _Tags(page.html("dense")).tags == {"p"} and _Tags(page.html("dense")).text == f"question: {EVIL}"


def test_wrong_questions_other_hosts_and_taken_ports_are_refused(page: Page) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'tct_hf[demo]'")
    from starlette.testclient import TestClient

    client = TestClient(page_app(page), base_url="http://127.0.0.1")
    assert client.get("/search", params={"q": "dense", "k": 2}).json()["passages"]["dense"][1]["rank"] == 2
    for query, said in ((" ", "question: it is blank"), ("a&k=0", "k: 0 is below 1"), ("a&k=51", "k: 51 is above 50")):
        refused = client.get(f"/search?q={query}")
        assert refused.status_code == 422 and said in refused.json()["detail"]
    assert client.get("/search?q=dense", headers={"Host": "elsewhere.example"}).status_code == 400
    assert TestClient(page_app(page, local=False)).get("/search?q=dense").status_code == 200

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"host, port: 127\.0\.0\.1:{port} can't be used .*; --port 0 takes"):
            serve(page, "127.0.0.1", port, print)
    for host, port, said in (("127.0.0.1", 99999, "port must be 0-65535[.]"), ("no.invalid", 0, "[^-]+")):
        with pytest.raises(ValueError, match=rf"host, port: {host}:{port} can't be used .*{said}\)"):
            serve(page, host, port, print)


# --- in a browser ---


@pytest.fixture(scope="module")
def address(page: Page) -> Iterator[str]:
    """The page, served."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'tct_hf[demo]'")
    import uvicorn

    app = page_app(replace(page, examples=["dense tokens", EVIL]))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser: pip install playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs chromium, such as apt-get install chromium")
    off = ["background-networking", "component-update", "sync", "quic"]
    flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in off)]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=flags)
        yield opened
        opened.close()


@pytest.mark.browser
@pytest.mark.slow
def test_a_question_is_asked_and_answered_in_a_browser(page: Page, address: str, browser: Any, tmp_path: Path) -> None:
    asked: list[str] = []
    said: list[str] = []
    tab = browser.new_page(viewport={"width": 1400, "height": 900})
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(address)
    tab.get_by_text("Type a question").wait_for()
    tab.get_by_placeholder("Ask a question").fill("dense tokens")
    tab.get_by_role("button", name="Search").click()
    tab.locator(".found section").first.wait_for()
    expected = page.json("dense tokens")["passages"]
    assert tab.locator("h2").evaluate_all("heads => heads.map(one => one.firstChild.textContent)") == [
        "BM25",
        "Student",
        "Hybrid",
        "Teacher",
    ]
    for column, found in enumerate(expected.values()):
        shown = tab.locator(".found section").nth(column).locator("code").all_text_contents()
        assert shown == [hit["id"] for hit in found]
    # Ranks stand in rows; a long passage is cut until it is clicked.
    places = [tab.locator(".found section").nth(at).locator("article").nth(1).bounding_box()["y"] for at in range(4)]
    assert max(places) - min(places) < 1
    long = tab.locator("summary", has_text="tokens dense tokens dense").first
    before = long.bounding_box()["height"]
    long.click()
    assert long.bounding_box()["height"] > 5 * before > 0
    assert tab.locator("mark").count() and tab.locator(".found u").count()
    # A passage and a question that would be programs are shown as they are.
    tab.get_by_placeholder("Ask a question").fill(EVIL)
    tab.keyboard.press("Enter")
    tab.get_by_text("<img src=x onerror=alert(1)>").first.wait_for()
    assert not tab.locator("#component-0 img, .found img, .found script").count() and said == []
    # Nothing was asked of any other machine, and a narrow page has one column.
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    tab.set_viewport_size({"width": 420, "height": 900})
    lefts = {round(box["x"]) for box in (one.bounding_box() for one in tab.locator(".found section").all())}
    assert len(lefts) == 1 and tab.evaluate("document.documentElement.scrollWidth") <= 420
    tab.close()
