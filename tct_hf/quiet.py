"""Less noise from libraries, so that a recipe's own lines can be read."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from typing import Any

# Logged as warnings, but true of every run of a recipe and nothing that a user can mend: logger to how it begins.
NOTICES = {
    "sentence_transformers.base.training_args": "When using DistributedDataParallel",  # a short last batch is left out
    "sentence_transformers.base.model": "Default prompt name is set to",  # by this package, for plain encode()
    "transformers.trainer_utils": "mtime may not be reliable",  # checkpoints are then ordered by their numbers
}


def _no_notice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOTICES.get(record.name, "\0"))


def quieten() -> None:
    """Show warnings and errors of the model libraries, without their progress bars and notices."""
    import datasets
    import transformers
    from sentence_transformers.base import model_card

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    bar: Any = getattr(model_card, "tqdm", None)
    if bar is not None:  # over the examples of a model card; no switch turns it off
        model_card.tqdm = partial(bar, disable=True)
    transformers.utils.logging.set_verbosity_warning()
    for name in NOTICES:
        logging.getLogger(name).addFilter(_no_notice)
    # Of calls that these libraries make to torch and to each other.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(accelerate|sentence_transformers)\.")
    # Raised when compiled wheels are imported; nothing that a user can mend.
    warnings.filterwarnings("ignore", message="builtin type .* has no __module__ attribute")
