"""Push a training run's models while it goes on, so that every pushed revision loads and no failure stops it."""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from sentence_transformers.base.trainer import BaseTrainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from tct_hf.files import write_text_atomic

logger = logging.getLogger(__name__)

# Files of a checkpoint that are the run's and not the model's.
OF_THE_RUN = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "training_args.bin")

# Strategies that push all that it takes to go on with the training.
_RESUMABLE = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)

# A checkpoint is pushed from links to its files: it may be rotated away before all of it has gone out.
PUSHED_FROM = ".pushing"


class PushingMixin(BaseTrainer):
    """Pushes whole, finalised models: pickles only where they were asked for, in a folder of their own.

    transformers pickles the arguments, Hub token included, into what it uploads, takes a part of the files, and says
    nothing when a push fails.
    """

    _hub: HfApi | None = None

    def _hub_api(self) -> HfApi:
        """The run's one client: its queue sends one push after the other, so that a slow one undoes no later one."""
        if self._hub is None:
            self._hub = HfApi()
        return self._hub

    def push_checkpoint(self, checkpoint: str) -> None:
        """Begin to push a finished checkpoint, as `hub_strategy` asks; a push under way is not waited for.

        Args:
            checkpoint: its folder, whole.
        """
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
        try:
            links = _link(Path(checkpoint), Path(str(args.output_dir)) / PUSHED_FROM, keep=busy)
            if resumable:
                _say_what_is_pickled(links, folder)
        except OSError as error:
            logger.warning(f"{checkpoint} is not pushed ({error}); training goes on.")
            return
        upload: Any = partial(
            self._hub_api().upload_folder,
            repo_id=self.hub_model_id,
            folder_path=links,
            token=args.hub_token,
            revision=args.hub_revision,
            run_as_future=True,
        )
        message = f"Training in progress, step {self.state.global_step}"
        jobs: list[Future[Any]] = [upload(commit_message=message, ignore_patterns=list(OF_THE_RUN))]
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

        What is pushed is saved once more into a folder of its own: in `output_dir` there may be downloaded
        checkpoints, logs and files of anybody's.

        Args:
            commit_message: of the commit.
            blocking: wait until it has arrived.
            token: of the Hub; the arguments' when None.
            revision: branch; the arguments' when None.
            private: of a repository that is made.
            **kwargs: of `create_model_card`.

        Returns:
            The commit; a Future of it when not blocking.

        Raises:
            HubError: the Hub refused or could not be reached.
        """
        from tct_hf.hub_client import hub_errors

        args: Any = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        token = token if token is not None else args.hub_token
        if self.hub_model_id is None:
            with hub_errors(str(args.hub_model_id or args.output_dir), "making the repository"):
                self.init_hf_repo(token=token, private=private)
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
        try:
            with hub_errors(repo_id, "pushing the model"):
                done: Any = self._hub_api().upload_folder(
                    repo_id=repo_id,
                    folder_path=pushed,
                    commit_message=commit_message,
                    token=token,
                    run_as_future=not blocking,  # type: ignore[call-overload]
                    ignore_patterns=list(OF_THE_RUN),
                    revision=revision if revision is not None else args.hub_revision,
                )
        except BaseException:
            blocking = True
            raise
        finally:
            if blocking:
                shutil.rmtree(pushed.parent, ignore_errors=True)
        if not blocking:
            done.add_done_callback(lambda job: shutil.rmtree(pushed, ignore_errors=True))
        return done


def _link(checkpoint: Path, place: Path, *, keep: bool) -> Path:
    """The files of a checkpoint once more, under a name that nothing rotates away; copied where links can't be."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    if not keep:  # nothing is going out from there
        shutil.rmtree(place, ignore_errors=True)
    target = place / checkpoint.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(checkpoint, target, copy_function=link)
    return target


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
    from tct_hf.hub_client import HubError, hub_errors

    error = None if job.cancelled() else job.exception()
    if error is None:
        return
    try:
        with hub_errors(what, "pushing during training"):
            raise error
    except HubError as told:
        logger.warning(f"A push failed; training goes on, and the next save pushes again. {told}")
    except BaseException as other:
        logger.warning(f"A push failed ({what}: {other!r}); training goes on, and the next save pushes again.")
