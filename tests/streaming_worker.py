"""Train on streamed rows in a process of its own; each process writes the rows of every step it has trained on.

python -m tests.streaming_worker MODELS OUTPUT SETTINGS(json)
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def main(models: Path, output: Path, settings: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    from sentence_transformers import SentenceTransformer
    from transformers.trainer_utils import get_last_checkpoint

    from tct_hf import ColBERTTeacher, load_triples
    from tests.training import make_trainer

    kill_in_step = settings.pop("kill_in_step", None)
    buffer_size = settings.pop("shuffle_buffer", 0)
    rows = load_triples(settings.pop("path"), streaming=True)
    if buffer_size:
        rows = rows.shuffle(seed=3, buffer_size=buffer_size)
    teacher = ColBERTTeacher(str(models / "teacher" / "colbert"), dtype="float32")
    student = SentenceTransformer(str(models / "student"), device="cpu")
    trainer = make_trainer(output, student, teacher, rows, **settings)
    rank = trainer.accelerator.process_index
    tokenizer = student.tokenizer
    step = trainer.training_step
    seen = output / f"rows-{rank}.txt"

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step + 1 == kill_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        texts = tokenizer.batch_decode(inputs["query_input_ids"], skip_special_tokens=True)
        with seen.open("a") as file:
            file.write(json.dumps([int(text.split()[-1]) for text in texts]) + "\n")
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    output.mkdir(parents=True, exist_ok=True)
    last = get_last_checkpoint(str(output))
    trainer.train(resume_from_checkpoint=last)
    digest = hashlib.sha256()
    for _, tensor in sorted(student.state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    if rank == 0:
        said = {"resumes": Path(last).name if last else None, "weights": digest.hexdigest()}
        (output / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    for name, case in json.loads(sys.argv[3]).items():
        main(Path(sys.argv[1]), Path(sys.argv[2]) / name, case)
    from accelerate import PartialState

    # Left to the interpreter's end, the group's threads may abort the process.
    PartialState().destroy_process_group()
