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
    from sentence_transformers import SentenceTransformer, SparseEncoder
    from transformers import TrainerCallback

    from tct_hf import batches as batching
    from tests.train_helpers import logged, make_teacher, make_trainer, triples, with_scores

    class KeepGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                gradients = {
                    n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None
                }
                torch.save(gradients, output / "gradients.pt")

    output.mkdir(parents=True, exist_ok=True)
    streaming = settings.pop("streaming", False)
    teacher = make_teacher(models, settings.pop("teacher", "colbert"))
    name = settings.pop("student", "student")
    student: Any = (SparseEncoder if name == "sparse" else SentenceTransformer)(str(models / name), device="cpu")
    batching.CPU_PADDING = settings.pop("padding", batching.CPU_PADDING)
    rows: Any = with_scores(12, negatives=2)
    uneven = settings.pop("uneven", False)
    if labelled := settings.pop("labelled", None):
        rows = rows.add_column("labelled", labelled)
    if settings.pop("two", False):  # of different widths: gathering across data sets would not even fit
        rows = DatasetDict(a=rows, b=triples(12, negatives=1).map(lambda row: {"query": "other " + row["query"]}))
    trainer = make_trainer(
        output,
        student,
        teacher,
        rows.to_iterable_dataset() if streaming else rows,
        eval_dataset=with_scores(6, negatives=2),
        callbacks=[KeepGradients()],
        max_steps=2,
        optim="sgd",  # Adam makes steps of the rounding noise in gradients that are zero
        learning_rate=0.05,
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=2,
        **settings,
    )
    if uneven:
        one_uneven_step(trainer, output)
        return
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        torch.save(student.state_dict(), output / "weights.pt")
        (output / "losses.json").write_text(json.dumps([logged(trainer), metrics["eval_loss"]]))


def one_uneven_step(trainer: Any, output: Path) -> None:
    """Loss and gradients of a batch of which the first process has the most rows."""
    import torch
    from accelerate import PartialState

    state = PartialState()
    of = {1: [12], 2: [9, 3], 3: [7, 4, 1]}[state.num_processes]
    first = sum(of[: state.process_index])
    rows = [trainer.train_dataset[row] for row in range(first, first + of[state.process_index])]
    model = trainer.accelerator.prepare(trainer.model)
    trainer.model_wrapped = model
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    loss.backward()
    everyones = trainer.accelerator.gather(loss.detach().reshape(1))
    if state.is_main_process:
        gradients = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.save(gradients, output / "gradients.pt")
        (output / "losses.json").write_text(json.dumps([[everyones.mean().item()], 0.0]))


def check_scores_of_travelling_queries() -> None:
    """Every process's block of scores is that of the whole, whatever its sizes, in both types."""
    import torch
    from accelerate import PartialState
    from sentence_transformers.util import maxsim

    from tct_hf.batches import score_where_the_passages_are

    state = PartialState()
    world, rank, columns = state.num_processes, state.process_index, 3
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in ([2, 3, 1][:world], [2] * world):
            made = []
            for other in range(world):
                generator = torch.Generator().manual_seed(other)
                queries = torch.randn(sizes[other], 4 + other, 8, generator=generator).to(dtype)
                passages = torch.randn(columns * sizes[other], 9 - other, 8, generator=generator).to(dtype)
                query_mask, passage_mask = (
                    torch.rand(x.shape[:2], generator=generator) < 0.8 for x in (queries, passages)
                )
                query_mask[:, 0] = passage_mask[:, 0] = True
                made.append((queries, query_mask, passages, passage_mask))

            def similarity(a: Any, b: Any, a_mask: Any, b_mask: Any) -> Any:
                return maxsim(a.float(), b.float(), a_mask, b_mask)

            mine = made[rank]
            found = score_where_the_passages_are(*mine, columns, similarity)
            blocks = [similarity(mine[0], other[2], mine[1], other[3]) for other in made]
            expected = torch.cat([block.view(sizes[rank], columns, -1) for block in blocks], dim=2).flatten(1)
            torch.testing.assert_close(found, expected)


if __name__ == "__main__":
    for name, case in json.loads(sys.argv[3]).items():
        main(Path(sys.argv[1]), Path(sys.argv[2]) / name, case)
    from accelerate import PartialState

    if PartialState().num_processes > 1:
        check_scores_of_travelling_queries()

    # Left to the interpreter's end, the group's threads may abort the process.
    PartialState().destroy_process_group()
