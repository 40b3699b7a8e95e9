"""What every trainer here adds to its library's: checkpoints that are whole or not there, pushes, streamed rows."""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from sentence_transformers.base.evaluation import SequentialEvaluator
from sentence_transformers.base.model_card import BaseModelCardCallback
from torch import Tensor, nn
from torch.utils import data
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints
from transformers.utils import PushInProgress
from transformers.utils.hub import hf_api

from tct_hf.encoding.routes import whole
from tct_hf.encoding.weights import half_attention, master_weights, refuse_not_finite
from tct_hf.files import CONTENTS_FILE, replace_dir, seal, writing
from tct_hf.hub_client import hub_errors
from tct_hf.training.checkpoints import last_whole_checkpoint, refuse_damaged
from tct_hf.training.streaming import PassOver, same_order_everywhere, streamed_loader

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"  # checkpoints are written here and renamed when whole; matches no checkpoint's name
PUSHED_FROM = ".pushing"  # what is pushed: a checkpoint may be rotated away before all of it has gone out
PATIENCE = 3  # first steps without a gradient before training stops: a batch may have no label
# Files of a checkpoint that are the run's and not the model's.
OF_THE_RUN = ["optimizer*", "scheduler*", "scaler*", "rng_state*", "projections*", TRAINER_STATE_NAME, CONTENTS_FILE]
# Steps in a row that fp16's scaler may skip: it halves its factor at each, 2^16 at first, until gradients are finite.
SKIPPED_IN_A_ROW = 32


class ResumableTrainer(Trainer):
    """The base of all trainers here, before a trainer of transformers or sentence-transformers.

    Checkpoints are written aside, sealed by checksums and renamed when whole (transformers writes straight into
    `checkpoint-N`), and every pushed revision is a whole, finalised model; a push that fails stops nothing. A resumed
    run of streamed rows goes on with the row that follows. Training stops at the first loss or gradient that is not
    finite, and where no step changes a weight. Weights are trained in float32, whatever they were loaded in, and
    evaluation in half precision leaves them as they were.
    """

    _aside: str | None = None
    _idle_steps: int | None = 0  # steps that changed no weight; None once there was one that did
    _rate = 0.0  # the highest learning rate of the last of them
    _skipped_steps = 0  # in a row, by fp16's scaler

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        master_weights(self.model)
        self.add_callback(PassOver())
        self.add_callback(_NothingLearned(self))
        self.add_callback(_WholeCard(self))

    def call_model_init(self, trial: Any = None) -> Any:
        """The model of `model_init`, in float32."""
        return master_weights(super().call_model_init(trial))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as `transformers.Trainer.train`; True resumes from the last checkpoint that is not damaged."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir)) or True
        elif resume_from_checkpoint:
            refuse_damaged(resume_from_checkpoint)
        master_weights(self.model)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; bf16_full_eval and fp16_full_eval round the weights themselves, which come back."""
        in_half = (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.is_in_train
        model: Any = self.model
        kept = copy.deepcopy(model.state_dict()) if in_half else None
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if kept is not None:
                model.float().load_state_dict(kept)

    def _load_best_model(self) -> None:
        if os.path.isdir(self.state.best_model_checkpoint or ""):
            refuse_damaged(str(self.state.best_model_checkpoint))  # else the last weights would be taken
        super()._load_best_model()

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with whole(self.model):  # as it was saved
            super()._load_from_checkpoint(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = self.args.metric_for_best_model or ""
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}", 0.0)
        if not math.isfinite(value):
            raise ValueError(
                f"Training stopped at step {self.state.global_step}: {name}, which chooses the best model, is "
                f"{value}. Set metric_for_best_model to another metric, or lower learning_rate."
            )
        return super()._determine_best_metric(metrics, trial)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One batch forward and backward; refuses a loss that is not finite."""
        try:
            with half_attention(self.args.device):
                loss = super().training_step(*args, **kwargs)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise ValueError("No weight of the loss is trained: unfreeze some with requires_grad_(True).") from error
        self._refuse_not_finite("loss", float(loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is not None and not math.isfinite(float(norm)):
            self._skipped_steps += 1  # a scaler skips them, and scales down
            if self._skipped_steps < SKIPPED_IN_A_ROW:
                return norm
        self._refuse_not_finite("gradient", float(norm))
        self._skipped_steps = 0
        if self._idle_steps is not None:
            optimizer: Any = self.optimizer
            self._rate = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
            self._idle_steps = self._idle_steps + 1 if 0.0 in (float(norm), self._rate) else None
            if self._idle_steps == PATIENCE:
                self.refuse_idle()
        return norm

    def _refuse_not_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        stopped = f"Training stopped at step {self.state.global_step + 1}: the {what} is {value}, "
        if not self.state.global_step:
            raise ValueError(
                f"{stopped}before any weight has changed. Check weights, the teacher's scores and settings."
            )
        raise ValueError(
            f"{stopped}with learning rate {self._get_learning_rate():.3g} and max_grad_norm "
            f"{self.args.max_grad_norm:g}. Lower learning_rate, or set max_grad_norm=1.0, and start again."
        )

    def refuse_idle(self) -> None:
        """Stop a run whose steps have no gradient, or a learning rate of 0."""
        if not self._rate:
            raise ValueError("learning_rate is 0, so nothing is learned: raise it.")
        raise ValueError(
            f"The gradient of the first {self._idle_steps} steps is 0, so nothing is learned: raise "
            "per_device_train_batch_size, give rows negatives, unfreeze the weights to train, and give a part of the "
            "loss a weight above 0."
        )

    def _refuse_few_rows(self, name: str, count: int) -> None:
        args: Any = self.args
        processes = 1 if args.accelerator_config.split_batches else self.accelerator.num_processes
        whole = args.train_batch_size * processes if args.dataloader_drop_last else 1
        if count < whole:
            raise ValueError(
                f"{name} has {count} rows, fewer than one whole batch ({args.train_batch_size} on each of {processes} "
                "processes): give it more, or lower per_device_train_batch_size."
            )

    def restore(self, checkpoint: str, state: TrainerState) -> None:
        """Take on the model, state and card of a checkpoint, without training further."""
        self._load_from_checkpoint(checkpoint)
        self.state = state
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, (BaseModelCardCallback, _WholeCard)):
                begin: Any = callback.on_train_begin
                begin(self.args, state, self.control, model=self.model)

    def finalise(self, path: str) -> None:
        """Complete what was saved to a folder."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Recent transformers call this in every process and leave the check to it; sentence-transformers has none:
        # processes would write into one another's files.
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        refuse_not_finite(self.accelerator.unwrap_model(self.model).named_parameters(), f"The model for {folder}")
        token, self.args.hub_token = self.args.hub_token, None  # it would be pickled with the arguments
        try:
            with whole(self.accelerator.unwrap_model(self.model)):
                super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle
        self.finalise(str(folder))

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: it is pushed when it has its name."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        aside = os.path.join(run_dir, UNFINISHED)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            with writing(os.path.join(run_dir, name)):
                super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = os.path.join(run_dir, name)
        if self.args.should_save:
            self.state.save_to_json(os.path.join(aside, name, TRAINER_STATE_NAME))
            seal(Path(aside, name))
            replace_dir(os.path.join(aside, name), os.path.join(run_dir, name))
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_checkpoint(Path(run_dir, name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Begin to push a whole checkpoint, as `hub_strategy` asks; waits for one under way if `hub_always_push`."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self._finish_current_push()
        source = Path(str(args.output_dir), PUSHED_FROM, checkpoint.name)
        try:
            shutil.copytree(checkpoint, source)
        except OSError as error:
            logger.warning(f"{checkpoint} is not pushed; training goes on, and the next save pushes again. {error}")
            return
        upload = partial(
            hf_api().upload_folder,
            repo_id=self.hub_model_id,
            folder_path=source,
            token=args.hub_token,
            revision=args.hub_revision,
            run_as_future=True,
        )
        message = f"Training in progress, step {self.state.global_step}"
        jobs: list[Any] = [upload(commit_message=message, ignore_patterns=OF_THE_RUN)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            folder = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            jobs.append(upload(commit_message=f"{message}, checkpoint", path_in_repo=folder))
        for job in jobs:
            job.add_done_callback(partial(_say_if_failed, what=f"{checkpoint.name} to {self.hub_model_id}"))
        pushes: Any = PushInProgress
        self.push_in_progress = pushes(jobs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if self.is_world_process_zero():
            shutil.rmtree(Path(str(self.args.output_dir)) / PUSHED_FROM, ignore_errors=True)

    def push_to_hub(self, *arguments: Any, **named: Any) -> Any:
        """Save the model into a folder of its own and push that, and nothing else that lies in the run's folder.

        Arguments and result as of `transformers.Trainer.push_to_hub`.
        """
        args: Any = self.args
        self._finish_current_push()
        folder, pushed = args.output_dir, None
        # The same name, because transformers may name the repository after it.
        args.output_dir = os.path.join(folder, PUSHED_FROM, Path(folder).resolve().name)
        try:
            with hub_errors(str(self.hub_model_id or args.hub_model_id or folder), "pushing the model"):
                pushed = super().push_to_hub(*arguments, **named)
        finally:
            args.output_dir = folder
            if isinstance(pushed, Future):
                pushed.add_done_callback(lambda job: self._finish_current_push())
            else:
                self._finish_current_push()
        return pushed

    def get_train_dataloader(self) -> data.DataLoader[Any]:
        """The batches of training, without end for a streamed data set; of one pass where nothing is being trained."""
        rows: Any = self.train_dataset
        if not isinstance(rows, IterableDataset):
            for name, one in rows.items() if isinstance(rows, dict) else [("train_dataset", rows)]:
                self._refuse_few_rows(name, len(one))
            return super().get_train_dataloader()
        if self.accelerator.num_processes > 1:
            same_order_everywhere(rows, self.accelerator.device)
        passes = None if self.is_in_train else 1
        self._train_dataloader = streamed_loader(self, rows, self.args.train_batch_size, passes)
        return self._train_dataloader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> data.DataLoader[Any]:
        """The batches of evaluation, one pass, the same ones each time."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]  # type: ignore[index,call-overload]
        if not isinstance(rows, IterableDataset):
            return super().get_eval_dataloader(eval_dataset)
        # By default one process reads for all: it joins their batches, and fails where these are of unequal width.
        return streamed_loader(self, rows, self.args.eval_batch_size, 1)


class _NothingLearned(TrainerCallback):
    """Refuses to end, or to save, a run that changed no weight."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self.begun = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun, self.trainer._idle_steps = state.global_step, 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.max_steps <= 0:
            raise ValueError(f"num_train_epochs={args.num_train_epochs:g} makes no step: raise it, or set max_steps.")
        if not state.global_step:
            raise ValueError(
                "No batch was made of train_dataset: give it more rows with different texts, lower "
                "per_device_train_batch_size or set batch_sampler to batch_sampler."
            )
        if not self.begun and self.trainer._idle_steps:
            self.trainer.refuse_idle()

    on_train_end = on_epoch_end  # without an epoch there is no end of one


class _WholeCard(TrainerCallback, ExportableState):
    """Keeps what the model card tells of training in every checkpoint: sentence-transformers begins it anew.

    The card then tells of the whole run, the same however often it was interrupted, and therefore of no durations.
    """

    def __init__(self, trainer: ResumableTrainer) -> None:
        evaluator: Any = getattr(trainer, "evaluator", None)  # trainers of transformers have none
        whole = isinstance(evaluator, SequentialEvaluator)
        self.evaluators = evaluator.evaluators if whole else [evaluator] if evaluator else []
        self.card: Any = getattr(trainer.model, "model_card_data", None)  # models of transformers have none

    def state(self) -> dict[str, Any]:
        logs, results = getattr(self.card, "training_logs", []), getattr(self.card, "eval_results_dict", {})
        # An evaluator gives its metrics their whole names when it is first called.
        of = [[getattr(one, "primary_metric", None), _plain(results.get(one, {}))] for one in self.evaluators]
        return {"args": {}, "attributes": {"logs": [_plain(line) for line in logs], "results": of}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.card is None:
            return
        self.card._training_start_time = None
        kept = ((state.stateful_callbacks or {}).get(type(self).__name__) or {}).get("attributes")
        if state.global_step and kept:
            self.card.training_logs = [dict(line) for line in kept["logs"]]
            for one, (primary, results) in zip(self.evaluators, kept["results"], strict=False):
                if results:
                    one.primary_metric = primary
                    self.card.eval_results_dict[one] = dict(results)


def _plain(numbers: Mapping[str, Any]) -> list[tuple[str, Any]]:
    # Pairs: the trainer's state is saved with its keys sorted.
    return [(name, value if isinstance(value, int) else float(value)) for name, value in numbers.items()]


def _say_if_failed(job: Future[Any], *, what: str) -> None:
    try:
        with hub_errors(what, "pushing during training"):
            job.result()
    except Exception as error:
        logger.warning(f"A push failed; training goes on, and the next save pushes again. {error}")
