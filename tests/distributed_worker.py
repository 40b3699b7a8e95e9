"""One training step a case, in one process or under `accelerate launch`; rank 0 writes the loss and the gradients.

python -m tests.distributed_worker MODELS OUTPUT CASES(json: name to settings)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(models: Path, output: Path, settings: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    from datasets import DatasetDict
    from sentence_transformers import SentenceTransformer
    from transformers import TrainerCallback

    from tct_hf import ColBERTTeacher, batching
    from tests.training import logged, make_trainer, triples

    class KeepGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                gradients = {
                    n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None
                }
                torch.save(gradients, output / "gradients.pt")

    output.mkdir(parents=True, exist_ok=True)
    streaming = settings.pop("streaming", False)
    teacher = ColBERTTeacher(str(models / "teacher" / "colbert"), dtype="float32")
    student = SentenceTransformer(str(models / settings.pop("student", "student")), device="cpu")
    batching.CPU_PADDING = settings.pop("padding", batching.CPU_PADDING)
    rows: Any = triples(8, negatives=2)
    if settings.pop("two", False):  # of different widths: gathering across data sets would not even fit
        rows = DatasetDict(a=rows, b=triples(8, negatives=1).map(lambda row: {"query": "other " + row["query"]}))
    trainer = make_trainer(
        output,
        student,
        teacher,
        rows.to_iterable_dataset() if streaming else rows,
        eval_dataset=triples(6, negatives=2),
        callbacks=[KeepGradients()],
        max_steps=1,
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=1,
        **settings,
    )
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        (output / "losses.json").write_text(json.dumps([logged(trainer), metrics["eval_loss"]]))


if __name__ == "__main__":
    for name, case in json.loads(sys.argv[3]).items():
        main(Path(sys.argv[1]), Path(sys.argv[2]) / name, case)
    from accelerate import PartialState

    # Left to the interpreter's end, the group's threads may abort the process.
    PartialState().destroy_process_group()
