from pathlib import Path

import pytest

from tct_hf import load_beir, load_collection

WORDS = [f"word{number}" for number in range(400)]
GUIDE = f"""before any heading

# Guide #
```
# a comment of code, no heading
```
### Deep

## Install C# ##
```with pip```

from source
# Use
{" ".join(WORDS[:100])}

{" ".join(WORDS[100:180])}
"""


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "sub" / "guide.md").write_text(GUIDE)
    (folder / "long.TXT").write_text(f"# no heading here\n\n{' '.join(WORDS)}")
    for name in (".git/description.txt", ".hidden.md", "empty.md", "code.py"):
        (folder / name).write_text("" if name == "empty.md" else "left out")
    return folder


def test_passages_of_documents_are_sections_under_their_headings_and_parts_of_long_ones(notes: Path) -> None:
    corpus = load_collection(str(notes), required=()).corpus
    rows = {row["id"]: (row["title"], row["text"].removeprefix(row["title"]).strip()) for row in corpus}
    assert rows == {
        "long.TXT#1": ("", "# no heading here"),
        "long.TXT#2": ("", " ".join(WORDS[:150])),
        "long.TXT#3": ("", " ".join(WORDS[150:300])),
        "long.TXT#4": ("", " ".join(WORDS[300:])),
        "sub/guide.md#1": ("", "before any heading"),
        "sub/guide.md#2": ("Guide", "```\n# a comment of code, no heading\n```"),
        "sub/guide.md#3": ("Guide: Install C#", "```with pip```\n\nfrom source"),
        "sub/guide.md#4": ("Use", " ".join(WORDS[:100])),
        "sub/guide.md#5": ("Use", " ".join(WORDS[100:180])),
    }


def test_documents_are_read_again_when_one_changes_and_judged_by_their_passages_ids(notes: Path) -> None:
    (notes / "queries.jsonl").write_text('{"_id": "q", "text": "how do I install it"}\n')
    (notes / "qrels").mkdir()
    (notes / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tsub/guide.md#3\t1\n")
    corpus, queries, qrels = load_beir(notes, "test")
    assert (len(corpus), queries, qrels) == (9, {"q": "how do I install it"}, {"q": {"sub/guide.md#3": 1}})
    (notes / "sub" / "guide.md").write_text("# Guide\nnew")
    with pytest.raises(ValueError, match=r"'sub/guide\.md#3', which is not in the corpus of .*notes \(1 are missing"):
        load_beir(notes, "test")


def test_a_folder_without_documents_or_judgements_says_what_it_may_have(notes: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no train\.tsv.*splits there: none; .*recipes/unlabelled\.yaml"):
        load_collection(str(notes))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither corpus.*nor Markdown or text files instead, is there"):
        load_collection(str(tmp_path / "empty"), required=())


def test_a_document_that_is_not_utf_8_is_named_with_its_line(notes: Path) -> None:
    (notes / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.txt, line 2: not UTF-8"):
        load_collection(str(notes), required=())
    (notes / "corpus.parquet").write_bytes(b"PAR1")  # a collection in another format, with a README
    with pytest.raises(FileNotFoundError, match=r"neither corpus\.jsonl nor .*there is: .*corpus\.parquet"):
        load_collection(str(notes), required=())
