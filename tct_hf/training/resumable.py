"""What every trainer here adds to its library's: checkpoints that are whole or not there, pushes, streamed rows."""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from huggingface_hub import HfApi
from torch import nn
from torch.utils import data
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints
from transformers.utils import PushInProgress

from tct_hf.files import replace_dir, write_text_atomic
from tct_hf.hub_client import HubError, hub_errors
from tct_hf.training.streaming import PassOver, check_streamed, same_order_everywhere, streamed_loader

logger = logging.getLogger(__name__)

# Checkpoints are written here and renamed when whole; its name matches no checkpoint's.
UNFINISHED = ".unfinished"

# A checkpoint is pushed from links to its files: it may be rotated away before all of it has gone out.
PUSHED_FROM = ".pushing"

# Files of a checkpoint that are the run's and not the model's.
OF_THE_RUN = ["optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "training_args.bin"]

# Strategies that push all that it takes to go on with the training.
_RESUMABLE = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


class ResumableTrainer(Trainer):
    """The base of all trainers here, before a trainer of transformers or sentence-transformers.

    Checkpoints: each is written aside and renamed when it is whole, without the Hub token. transformers writes
    straight into `checkpoint-N` and resumes from the highest number, so that a kill during a save leaves half a
    checkpoint which is chosen next.

    Pushes: every pushed revision is a whole, finalised model, with pickles only where they were asked for, in a folder
    of their own; a push that fails is logged and stops nothing. transformers pickles the arguments, Hub token
    included, into what it uploads, takes a part of the files, and says nothing when a push fails.

    Streamed rows: training and evaluation on an `IterableDataset`, by :class:`~tct_hf.training.streaming.
    StreamedBatches`. To the trainer, all passes of training together are one epoch of `max_steps` steps; a resumed run
    goes on with the row that follows. `dataloader_drop_last` has no effect: no row is left over.
    """

    _aside: str | None = None
    _hub: HfApi | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_streamed(kwargs.get("train_dataset"), kwargs.get("args"))
        super().__init__(*args, **kwargs)
        self.add_callback(PassOver())

    def finalise(self, path: str) -> None:
        """Complete what was saved to a folder."""

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
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = os.path.join(run_dir, name)
        if self.args.should_save:
            self.state.save_to_json(os.path.join(aside, name, TRAINER_STATE_NAME))
            replace_dir(os.path.join(aside, name), os.path.join(run_dir, name))
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_checkpoint(os.path.join(run_dir, name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _upload(self, **arguments: Any) -> Any:
        # One client a run: its queue sends one push after the other, so that a slow one undoes no later one.
        self._hub = self._hub or HfApi()
        given = {"repo_id": self.hub_model_id, "token": self.args.hub_token, "revision": self.args.hub_revision}
        return self._hub.upload_folder(**{**given, **{k: v for k, v in arguments.items() if v is not None}})

    def _push_checkpoint(self, checkpoint: str) -> None:
        """Begin to push a whole checkpoint, as `hub_strategy` asks; a push under way is not waited for."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        running: Any = self.push_in_progress
        busy = running is not None and not running.is_done()
        if busy and not args.hub_always_push:
            return
        resumable = args.hub_strategy in _RESUMABLE
        name = os.path.basename(checkpoint)
        folder = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else name
        place = Path(str(args.output_dir)) / PUSHED_FROM
        try:
            if not busy:  # nothing is going out from there
                shutil.rmtree(place, ignore_errors=True)
            shutil.rmtree(place / name, ignore_errors=True)
            shutil.copytree(checkpoint, place / name, copy_function=_link)
            if resumable:
                _say_what_is_pickled(place / name, folder)
        except OSError as error:
            logger.warning(f"{checkpoint} is not pushed ({error}); training goes on.")
            return
        upload = partial(self._upload, folder_path=place / name, run_as_future=True)
        message = f"Training in progress, step {self.state.global_step}"
        jobs: list[Future[Any]] = [upload(commit_message=message, ignore_patterns=OF_THE_RUN)]
        if resumable:
            jobs.append(upload(commit_message=f"{message}, checkpoint", path_in_repo=folder))
        for job in jobs:
            job.add_done_callback(partial(_say_if_failed, what=f"{name} to {self.hub_model_id}"))
        if busy:
            running.jobs.extend(jobs)
        else:
            pushes: Any = PushInProgress
            self.push_in_progress = pushes(jobs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if self.is_world_process_zero():
            shutil.rmtree(Path(str(self.args.output_dir)) / PUSHED_FROM, ignore_errors=True)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and push it, and nothing else that lies in the run's folder.

        The pushed files are saved once more into a folder of their own: in `output_dir` there may be downloaded
        checkpoints, logs and other files.
        Arguments and result as of `transformers.Trainer.push_to_hub`.
        """
        args: Any = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if self.hub_model_id is None:
            with hub_errors(str(args.hub_model_id or args.output_dir), "making the repository"):
                self.init_hf_repo(token=token if token is not None else args.hub_token, private=private)
        self._finish_current_push()
        self.save_model(_internal_call=True)
        pushed = Path(args.output_dir) / PUSHED_FROM / "end"
        self.save_model(str(pushed), _internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo_id: Any = self.hub_model_id
        self.create_model_card(model_name=kwargs.pop("model_name", repo_id), **kwargs)
        if args.hub_strategy in _RESUMABLE:
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            _say_what_is_pickled(Path(args.output_dir), "last-checkpoint" if last else f"{PREFIX_CHECKPOINT_DIR}-*")
        shutil.copyfile(Path(args.output_dir) / "README.md", pushed / "README.md")
        arguments: dict[str, Any] = {"commit_message": commit_message, "token": token, "revision": revision}
        arguments["ignore_patterns"] = OF_THE_RUN
        try:
            with hub_errors(repo_id, "pushing the model"):
                done = self._upload(folder_path=pushed, run_as_future=not blocking, **arguments)
        except BaseException:
            blocking = True
            raise
        finally:
            if blocking:
                shutil.rmtree(pushed.parent, ignore_errors=True)
        if not blocking:
            done.add_done_callback(lambda job: shutil.rmtree(pushed, ignore_errors=True))
        return done

    def get_train_dataloader(self) -> data.DataLoader[Any]:
        """The batches of training, without end for a streamed data set; of one pass where nothing is being trained."""
        rows: Any = self.train_dataset
        if not isinstance(rows, IterableDataset):
            return super().get_train_dataloader()
        same_order_everywhere(rows, self.accelerator.device)
        passes = None if self.is_in_train else 1
        loader = streamed_loader(self, rows, self.args.train_batch_size, passes)
        self._train_dataloader = loader
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> data.DataLoader[Any]:
        """The batches of evaluation, one pass, the same ones each time."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]  # type: ignore[index,call-overload]
        if not isinstance(rows, IterableDataset):
            return super().get_eval_dataloader(eval_dataset)
        # By default one process reads for all: it joins their batches, and fails where these are of unequal width.
        return streamed_loader(self, rows, self.args.eval_batch_size, 1)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _say_what_is_pickled(folder: Path, place: str) -> None:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    heading = "## Going on with the training"
    if heading in text:
        return
    words = (
        f"`{place}/` holds what it takes to go on with the training: the model once more, and as pickles the "
        "optimizer, the random states and the arguments (without a token). Reading pickles can run code: take them "
        "only from somebody you trust. Loading the model does not touch them."
    )
    write_text_atomic(card, f"{text.rstrip()}\n\n{heading}\n\n{words}\n")  # a new file: the checkpoint's own stays


def _say_if_failed(job: Future[Any], *, what: str) -> None:
    error = None if job.cancelled() else job.exception()
    if error is None:
        return
    try:
        with hub_errors(what, "pushing during training"):
            raise error
    except HubError as told:
        why = str(told)
    except BaseException as other:
        why = f"{what}: {other!r}"
    logger.warning(f"A push failed; training goes on, and the next save pushes again. {why}")
