"""Arguments of a TCT training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sentence_transformers import SentenceTransformerTrainingArguments

# What the paper says, and what its released code does where that differs.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"temperature": 0.25, "student_temperature": 1.0, "hard_label_weight": 0.1},
    "released-code": {"temperature": 0.25, "student_temperature": 1.0, "hard_label_weight": 0.0},
}
DEFAULTS: dict[str, Any] = {"student_temperature": 1.0, "hard_label_weight": 0.1}


@dataclass
class TCTTrainingArguments(SentenceTransformerTrainingArguments):
    """Arguments of :class:`~tct_hf.TCTTrainer`: those of sentence-transformers and the coupled loss's.

    Args:
        temperature: divides the teacher's scores. None: 1 / (the scale the teacher was trained at), at which a
            teacher gives back the distribution it learned.
        student_temperature: divides the student's scores in the distillation part; 1.0 when None.
        hard_label_weight: weight of the hard labels, 0 to 1; 0.1 when None.
        candidates: "in-batch" or "own" (only a query's own positive and negatives).
        mini_batch_size: rows a forward pass when gradients are cached; None for no caching.
        preset: "paper" or "released-code": their temperature, student temperature and hard-label weight, where these
            are not given. The released code trains on the teacher alone (hard-label weight 0).
        per_device_eval_batch_size: the training batch size when None, since the loss depends on the batch.

    Raises:
        ValueError: a setting outside its range, or prompts and router_mapping (the student's encoding sets them).

    Source: Lin, Yang, Lin, arXiv 2010.11386, section 4.1, and its released code.
    """

    temperature: float | None = field(default=None, metadata={"help": "Divides the teacher's scores."})
    student_temperature: float | None = field(
        default=None, metadata={"help": "Divides the student's scores in the distillation part."}
    )
    hard_label_weight: float | None = field(default=None, metadata={"help": "Weight of the hard labels, 0 to 1."})
    candidates: str = field(default="in-batch", metadata={"help": 'Candidates of a query: "in-batch" or "own".'})
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Rows a forward pass when gradients are cached; None for no caching."}
    )
    preset: str | None = field(default=None, metadata={"help": 'Published loss settings: "paper" or "released-code".'})
    per_device_eval_batch_size: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "The training batch size when None: the loss depends on the batch."}
    )

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is not known: use one of {', '.join(PRESETS)}.")
        for name, value in (PRESETS[self.preset] if self.preset else DEFAULTS).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("temperature", "student_temperature"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be greater than 0, got {value}.")
        if not 0.0 <= (self.hard_label_weight or 0.0) <= 1.0:
            raise ValueError(f"hard_label_weight must be between 0 and 1, got {self.hard_label_weight}.")
        if self.candidates not in ("in-batch", "own"):
            raise ValueError(f'candidates must be "in-batch" or "own", got {self.candidates!r}.')
        if self.prompts or self.router_mapping:
            raise ValueError(
                "prompts and router_mapping come from the student's encoding: leave them out of the arguments."
            )
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        super().__post_init__()
        accelerator: Any = self.accelerator_config  # an AcceleratorConfig by now
        if accelerator.dispatch_batches is None:
            # Dispatching would join the ranks' batches, whose token matrices differ in width.
            accelerator.dispatch_batches = False
