from __future__ import annotations

import errno
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

from tct_hf.training import resumable
from tct_hf.training.run import train_colbert
from tct_hf.training.stages import Stage
from tests.hub.models import dual_encoder
from tests.loopback_hub import WRITER, LoopbackHub
from tests.models import tiny_colbert
from tests.train_helpers import PASSAGES, QUERIES, make_models, make_trainer, triples

NAME = "tester/run"
PICKLES = ("optimizer.pt", "rng_state.pth", "scheduler.pt")


def train(path: Path, *, strategy: str | None, steps: int = 4, resume: Any = None, **settings: Any) -> Any:
    student, teacher = make_models(path / "models")
    if strategy is not None:
        settings |= {"push_to_hub": True, "hub_model_id": NAME, "hub_strategy": strategy, "hub_always_push": True}
    every_step = {"save_strategy": "steps", "save_steps": 1, "max_steps": steps, "lr_scheduler_type": "constant"}
    trainer = make_trainer(path / "run", student, teacher, triples(36), **{**every_step, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same_weights(one: Any, other: Any) -> bool:
    weights = one.model.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in other.model.state_dict().items())


@pytest.mark.parametrize("strategy", ["end", "checkpoint", "all_checkpoints"])
def test_every_pushed_revision_loads_right(hub: LoopbackHub, tmp_path: Path, strategy: str) -> None:
    trainer = train(tmp_path, strategy=strategy, steps=2, hub_token=WRITER, save_total_limit=1)
    trainer.push_to_hub()
    revisions = [oid for oid, commit in hub.repo(NAME).commits.items() if "model.safetensors" in commit.files]
    assert len(revisions) >= {"end": 1, "checkpoint": 4, "all_checkpoints": 4}[strategy]
    vectors = {}
    for oid in revisions:
        model = SentenceTransformer(snapshot_download(NAME, revision=oid), device="cpu")
        assert type(model.tokenizer).__name__ == "TokenizersBackend" and model.prompts["query"] == "[Q] "
        vectors[oid] = torch.as_tensor(model.encode_query(QUERIES))
    expected = torch.as_tensor(trainer.model.encode_query(QUERIES))
    assert torch.equal(vectors[revisions[-1]], expected)  # the model's weights, and not another's
    assert strategy == "end" or not torch.equal(vectors[revisions[0]], expected)
    pickles = {name for name in hub.files(NAME) if name.endswith((".pt", ".pth", ".bin"))}
    folders = {"end": (), "checkpoint": ("last-checkpoint",), "all_checkpoints": ("checkpoint-1", "checkpoint-2")}
    assert pickles == {f"{folder}/{name}" for folder in folders[strategy] for name in PICKLES}
    written = [file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not any(WRITER.encode() in content for content in (*written, *hub.everything().values()))
    assert not (tmp_path / "run" / ".pushing").exists()


def test_training_goes_on_from_a_checkpoint_on_the_hub_and_failed_pushes_do_not_spoil_it(
    hub: LoopbackHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(tmp_path / "whole", strategy=None)
    train(tmp_path / "first", strategy="checkpoint", steps=2)
    folder = snapshot_download(NAME, allow_patterns="last-checkpoint/*", local_dir=tmp_path / "second" / "run")
    checkpoint = Path(folder) / "last-checkpoint"
    hub.forget()
    for name in ("sub/optimizer.pt", "notes.txt"):
        (checkpoint.parent / name).parent.mkdir(exist_ok=True)
        (checkpoint.parent / name).write_bytes(b"mine")
    hub.fail("/commit/", 403, times=99)
    with caplog.at_level(logging.WARNING):
        rest = train(tmp_path / "second", strategy="every_save", resume=str(checkpoint))
    assert "A push failed; training goes on" in caplog.text and "answered 403" in caplog.text
    assert rest.state.global_step == 4 and same_weights(rest, whole)
    hub.faults.clear()
    rest.push_to_hub()  # the model and nothing else of the folder
    files = set(hub.files(NAME))
    assert {"model.safetensors", "1_Pooling/config.json", "tokenizer.json", "README.md"} <= files
    assert not [name for name in files if name.endswith((".pt", ".pth", ".bin")) or name == "notes.txt"]
    assert [name for name in files if name.startswith(("last-", "sub/", "."))] == [".gitattributes"]
    assert (checkpoint.parent / "notes.txt").read_bytes() == b"mine"
    rest.push_to_hub(blocking=False).result()


def test_a_slow_push_undoes_no_later_one(hub: LoopbackHub, tmp_path: Path) -> None:
    second, under_way, overlapped = threading.Event(), [0], []

    def hold_the_first(method: str, path: str) -> None:
        if "/commit/" not in path:
            return
        under_way[0] += 1
        if under_way[0] == 1:
            overlapped.append(second.wait(timeout=1))  # another one could come meanwhile
        else:
            second.set()

    hub.on_request = hold_the_first
    trainer = train(tmp_path, strategy="every_save", steps=3)
    trainer._finish_current_push()
    assert overlapped == [False] and under_way[0] == 3
    assert hub.files(NAME)["model.safetensors"] == (tmp_path / "run/checkpoint-3/model.safetensors").read_bytes()


def test_a_full_disk_stops_no_training(
    hub: LoopbackHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resumable.shutil, "copytree", full)
    with caplog.at_level(logging.WARNING):
        trainer = train(tmp_path, strategy="every_save", steps=1)
    assert trainer.state.global_step == 1 and (tmp_path / "run/checkpoint-1/model.safetensors").is_file()
    assert "checkpoint-1 is not pushed; training goes on" in caplog.text and "No space left" in caplog.text


def test_a_teacher_is_pushed_with_its_scale(hub: LoopbackHub, tmp_path: Path) -> None:
    model = MultiVectorEncoder(str(tiny_colbert(tmp_path / "base")), device="cpu")
    arguments = {"push_to_hub": True, "hub_model_id": NAME, "hub_always_push": True, "save_steps": 1, "max_steps": 2}
    stage = Stage(
        tmp_path / "teacher",
        tmp_path / "work",
        settings={},
        arguments={**arguments, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True},
    )
    train_colbert(stage, lambda: model, lambda: triples(16), scale=4.0)
    pushed = [commit.files for commit in hub.repo(NAME).commits.values() if "model.safetensors" in commit.files]
    assert len(pushed) == 2  # the last checkpoint's files are the finished model's, its card among them
    assert all(json.loads(files["tct_teacher.json"].content) == {"training_scale": 4.0} for files in pushed)


def test_a_model_that_is_no_tct_student_is_pushed_as_it_is(hub: LoopbackHub, tmp_path: Path) -> None:
    _, teacher = make_models(tmp_path / "models")
    model = SentenceTransformer(str(dual_encoder(tmp_path / "dual")), device="cpu")
    settings = {"push_to_hub": True, "hub_model_id": NAME, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path / "run", model, teacher, triples(16), **settings).train()
    assert (SentenceTransformer(NAME, device="cpu").encode(PASSAGES) == model.encode(PASSAGES)).all()
