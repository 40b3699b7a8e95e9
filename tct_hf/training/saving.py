"""Checkpoints that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from tct_hf.files import replace_dir
from tct_hf.training.pushing import PushingMixin

# Checkpoints are written here and renamed when whole; its name matches no checkpoint's.
UNFINISHED = ".unfinished"


class SavedWholeMixin(Trainer):
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

    def push_whole(self, checkpoint: str) -> None:
        """Push a checkpoint that has its name; nothing here."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: it is pushed when it has its name."""

    @contextlib.contextmanager
    def _saving_aside(self, folder: str) -> Iterator[None]:
        self._aside = folder
        try:
            yield
        finally:
            self._aside = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

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
            self.push_whole(os.path.join(run_dir, name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


class WholeCheckpointsMixin(SavedWholeMixin, PushingMixin):
    """The same for sentence-transformers' trainers, which push what is whole."""

    def push_whole(self, checkpoint: str) -> None:
        """Begin to push it."""
        self.push_checkpoint(checkpoint)
