"""Tables that are named by a Hub id: "owner/name", "owner/name:configuration" or "owner/name:configuration:split"."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

# What is written so has an owner: a bare word may be a column. A name that ends as a file does is one, there or not.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".gz", ".pkl", ".pickle", ".pt", ".bin")


def is_hub_table(name: str) -> bool:
    """Whether a name is a Hub id, perhaps with configuration and split, and no file or folder that is here.

    Args:
        name: of a setting.
    """
    hub_id, _, _ = name.partition(":")
    if _NAME.fullmatch(hub_id) is None or Path(hub_id).suffix.lower() in _FILES:
        return False
    return not Path(name).exists()


def load_hub_table(name: str) -> Dataset:
    """Load the data set that a name stands for.

    Args:
        name: of :func:`is_hub_table`; without a split, the only one there is.

    Raises:
        FileNotFoundError: the data set, configuration or split is not there.
        ValueError: it can't be read, or there are several splits.
        OSError: the Hub can't be reached.
    """
    from tct_hf.data.sources import load_from_hub

    hub_id, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    return load_from_hub(hub_id, config or None, split or None)
