"""Train in a process of its own, so that a test can kill it; prints a digest of the final weights.

python -m tests.resume_worker MODELS OUTPUT SETTINGS(json)
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(models: Path, output: Path, settings: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    from sentence_transformers import SentenceTransformer, SparseEncoder
    from transformers.trainer_utils import get_last_checkpoint

    from tct_hf import load_triples
    from tests.train_helpers import make_teacher, make_trainer, with_scores

    kill_in_step = settings.pop("kill_in_step", None)
    kill_in_save = settings.pop("kill_in_save", None)
    stops = int(os.environ.get("RANK", "0")) == settings.pop("rank", 0)  # only this process is killed
    rows: Any = with_scores(settings.pop("rows", 36))
    if buffer_size := settings.pop("shuffle_buffer", None):
        rows.to_json(f"{output}.jsonl")
        rows = load_triples(f"{output}.jsonl", streaming=True).shuffle(seed=3, buffer_size=buffer_size)
    teacher = make_teacher(models, settings.pop("teacher", "colbert"))
    name = settings.pop("student", "student")
    student: Any = (SparseEncoder if name == "sparse" else SentenceTransformer)(str(models / name), device="cpu")
    trainer = make_trainer(output, student, teacher, rows, **settings)

    if stops and kill_in_step:
        name = "score_and_embed" if settings.get("embedding_weight") else "score_matrix"
        score = getattr(teacher, name)
        calls = 0

        def score_and_die(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == kill_in_step:
                kill()
            return score(*args, **kwargs)

        setattr(teacher, name, score_and_die)
    if kill_in_save is not None:
        write = torch.save

        def half_a_save(obj: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            write(obj, path, *args, **kwargs)
            if str(path).endswith("optimizer.pt") and f"checkpoint-{kill_in_save}" in str(path):
                with open(path, "r+b") as file:
                    file.truncate(100)
                kill()

        torch.save = half_a_save

    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if trainer.is_world_process_zero():
        print("resumes", Path(last).name if last else "nothing", flush=True)
    trainer.train(resume_from_checkpoint=last)
    if not trainer.is_world_process_zero():
        return
    digest = hashlib.sha256()
    for _, tensor in sorted(student.state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("weights", digest.hexdigest(), flush=True)
    print("losses", json.dumps(losses), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    from accelerate import PartialState

    # Left to the interpreter's end, a group's threads may abort the process.
    PartialState().destroy_process_group()
