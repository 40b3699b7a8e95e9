"""Checkpoints that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

from huggingface_hub import HfApi
from sentence_transformers.base.trainer import BaseTrainer
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints
from transformers.utils import PushInProgress

from tct_hf.files import replace_dir

# Checkpoints are written here and renamed when whole; its name matches no checkpoint's.
UNFINISHED = ".unfinished"

# Files of a checkpoint that are the run's and not the model's.
OF_THE_RUN = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "training_args.bin")


class WholeCheckpointsMixin(BaseTrainer):
    """Writes each checkpoint aside and renames it when it is whole, and never writes the Hub token.

    transformers writes straight into `checkpoint-N` and resumes from the highest number, so that a kill during a save
    leaves half a checkpoint which is chosen next.
    """

    _aside: str | None = None

    def finalise(self, path: str) -> None:
        """Complete what was saved to a folder; nothing to do unless a family says so."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Recent transformers call this in every process and leave the check to it; sentence-transformers has none:
        # processes would write into one another's files.
        if not self.args.should_save:
            return
        # training_args.bin is a pickle of the arguments: without this it holds the literal Hub token.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        self.finalise(output_dir or str(self.args.output_dir))

    @contextlib.contextmanager
    def _saving_aside(self, folder: str) -> Iterator[None]:
        self._aside = folder
        try:
            yield
        finally:
            self._aside = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the whole, finalised checkpoint without what belongs to the training run.

        transformers pickles the arguments, Hub token included, into what it uploads, and takes a part of the files.
        """
        args = self.args
        if self._aside is not None:  # pushed after the rename
            return
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        running: Any = self.push_in_progress
        busy = running is not None and not running.is_done()
        if busy and not args.hub_always_push:
            return
        upload = partial(
            HfApi().upload_folder,
            repo_id=self.hub_model_id,
            folder_path=checkpoint_folder,
            token=args.hub_token,
            revision=args.hub_revision,
            run_as_future=True,
        )
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [upload(commit_message=message, ignore_patterns=list(OF_THE_RUN))]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):  # asked for, to resume from
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            folder = "last-checkpoint" if last else os.path.basename(checkpoint_folder)
            jobs.append(upload(commit_message=f"{message}, checkpoint", path_in_repo=folder))
        if busy:
            running.jobs.extend(jobs)
        else:
            pushes: Any = PushInProgress
            self.push_in_progress = pushes(jobs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        aside = os.path.join(run_dir, UNFINISHED)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with self._saving_aside(aside):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = os.path.join(run_dir, name)
        if self.args.should_save:
            self.state.save_to_json(os.path.join(aside, name, TRAINER_STATE_NAME))
            replace_dir(os.path.join(aside, name), os.path.join(run_dir, name))
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_dir, name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
