"""Less noise from libraries, so that a recipe's own lines can be read."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Show warnings and errors of the model libraries, without their progress bars and notices."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("sentence_transformers", "huggingface_hub", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Raised when compiled wheels are imported; nothing that a user can mend.
    warnings.filterwarnings("ignore", message="builtin type .* has no __module__ attribute")
