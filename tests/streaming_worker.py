"""Train on streamed rows; each process writes the rows of every step and, where there are some, evaluated batch.

python -m tests.streaming_worker MODELS OUTPUT SETTINGS(json)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(models: Path, output: Path, settings: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    from sentence_transformers import SentenceTransformer

    from tct_hf import ColBERTTeacher, load_triples
    from tests.train_helpers import make_trainer

    buffer_size = settings.pop("shuffle_buffer", 0)
    rows = load_triples(settings.pop("path"), streaming=True)
    if buffer_size:
        rows = rows.shuffle(seed=3, buffer_size=buffer_size)
    teacher = ColBERTTeacher(str(models / "teacher" / "colbert"), dtype="float32")
    student = SentenceTransformer(str(models / "student"), device="cpu")
    evaluated = load_triples(settings.pop("evaluated"), streaming=True) if "evaluated" in settings else None
    trainer = make_trainer(output, student, teacher, rows, eval_dataset=evaluated, **settings)
    rank = trainer.accelerator.process_index
    tokenizer = student.tokenizer
    step = trainer.training_step
    predict = trainer.prediction_step

    def saw(inputs: Any, file_name: str) -> None:
        texts = tokenizer.batch_decode(inputs["query_input_ids"], skip_special_tokens=True)
        with (output / file_name).open("a") as file:
            file.write(json.dumps([int(text.split()[-1]) for text in texts]) + "\n")

    def prediction_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        saw(inputs, f"evaluated-{rank}.txt")
        return predict(model, inputs, *args, **kwargs)

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        saw(inputs, f"rows-{rank}.txt")
        return step(model, inputs, *args, **kwargs)

    trainer.training_step, trainer.prediction_step = training_step, prediction_step
    output.mkdir(parents=True, exist_ok=True)
    trainer.train()
    if rank == 0:
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        (output / "eval_losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    for name, case in json.loads(sys.argv[3]).items():
        main(Path(sys.argv[1]), Path(sys.argv[2]) / name, case)
    from accelerate import PartialState

    # Left to the interpreter's end, the group's threads may abort the process.
    PartialState().destroy_process_group()
