"""Checkpoints of a run that are whole: the newest of them, and a refusal of those that are not."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from tct_hf.files import CONTENTS_FILE, check_seal, read_json

logger = logging.getLogger(__name__)


def _damage(checkpoint: Path) -> str | None:
    """What changed in a checkpoint since it was saved; of one of an earlier version only its state is looked at."""
    try:
        if (checkpoint / CONTENTS_FILE).is_file():
            check_seal(checkpoint)
        read_json(checkpoint / TRAINER_STATE_NAME, "take another checkpoint", needs=["global_step", "max_steps"])
    except (ValueError, OSError) as error:
        return str(error)
    return None


def refuse_damaged(checkpoint: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint whose files have changed since it was saved."""
    if damage := _damage(Path(checkpoint)):
        raise ValueError(f"{checkpoint} is damaged ({damage}): delete it to go on from an earlier one.")


def last_whole_checkpoint(run_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a run that is not damaged, None where there is none; refused where all are damaged."""
    newest = sort_checkpoints(str(run_dir))[::-1]
    for checkpoint in newest:
        if not (damage := _damage(Path(checkpoint))):
            return checkpoint
        logger.warning(f"{checkpoint} is damaged ({damage}): training goes on from the checkpoint before it.")
    if newest:
        refuse_damaged(newest[0])
    return None
