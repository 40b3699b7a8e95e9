"""Write a published checkpoint as a folder that stock sentence-transformers loads right.

python recipes/convert.py --source castorini/tct_colbert-msmarco --output_dir outputs/tct [--setting value ...]

A bare TCT checkpoint becomes a student with its own vectors, a ColBERT (Stanford, PyLate) a teacher, a mean- or
CLS-pooled dual encoder a student to start from. What is not recognised is refused; say with --kind what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tct_hf.settings import SettingsError, run_recipe, setting


@dataclass
class Settings:
    source: str | None = setting(None, "folder or Hub id of the checkpoint")
    output_dir: str = setting("outputs/converted", "folder to write")
    kind: Literal["auto", "tct", "colbert", "dual-encoder"] = setting(
        "auto", "type of the source; auto: recognised by its files"
    )
    pooling: Literal["mean", "cls"] | None = setting(
        None, "pooling of a bare dual encoder, which its files do not record"
    )
    revision: str | None = setting(None, "branch, tag or commit of the source")
    query_length: int = setting(36, "length of a query in tokens, including prompt and [MASK]s")
    document_length: int | None = setting(
        None, "maximum length of a passage in tokens; null: 512 for a TCT checkpoint, otherwise 154"
    )


def main(settings: Settings) -> None:
    from tct_hf import convert_checkpoint, validate_checkpoint
    from tct_hf.progress import quieten

    if settings.source is None:
        raise SettingsError("source: name the checkpoint, such as --source castorini/tct_colbert-msmarco")
    quieten()
    given = dict(vars(settings))
    made = convert_checkpoint(given.pop("source"), given.pop("output_dir"), **given)
    print(f"{settings.source}: {made.why}", flush=True)
    if made.kind == "teacher":
        load = f'tct_hf.ColBERTTeacher("{made.path}")'
        checked = "not checked"
    else:
        load = f'SentenceTransformer("{made.path}")'
        report = validate_checkpoint(made.path)
        checked = f"{max(report.query, report.document, report.plain):.1e}"
    note = "train it before you search with it" if made.kind == "starting student" else "as the source's"
    print(
        f"\n| made | folder | vectors | off the rule by at most |\n|---|---|---|---:|\n"
        f"| {made.kind} | {made.path} | {note} | {checked} |\n\n{load}"
    )


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
