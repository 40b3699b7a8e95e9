"""What tests of searching share: a small collection, a student and a teacher on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tct_hf.data.collection import Collection, load_collection
from tests.models import tiny_bert, tiny_colbert
from tests.recipe import write_beir


@dataclass(frozen=True)
class Material:
    folder: Path
    beir: Path
    student: Path
    teacher: Path

    def collection(self) -> Collection:
        return load_collection(str(self.beir))


def write_material(folder: Path) -> Material:
    from tct_hf import build_student, save_student

    base = tiny_bert(folder / "base")
    save_student(build_student(str(base), encoding="tct", query_length=16, document_length=48), folder / "student")
    return Material(folder, write_beir(folder / "beir"), folder / "student", tiny_colbert(folder / "teacher"))
