"""Encode a small corpus into a folder, in one process or under `accelerate launch`, and maybe be killed on the way.

python -m tests.encode_worker MODEL OUTPUT [KILLED]

KILLED: "read" (as a passage of the third shard is read), or a file's name (before it is put in place).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

from tests.models import WORDS

COUNT = 23
SHARD = 5


def passages(count: int = COUNT) -> Iterator[dict[str, str]]:
    """Texts of different lengths, in no order of length."""
    for row in range(count):
        yield {"id": f"p{row}", "text": " ".join(WORDS[(row * 5 + place) % 14] for place in range(1 + row * 7 % 30))}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_while_reading() -> Iterator[dict[str, str]]:
    for row, passage in enumerate(passages()):
        if row == 2 * SHARD + 2:
            _die()
        yield passage


def main(model: str, output: str, killed: str = "") -> None:
    import torch

    torch.set_num_threads(1)
    from sentence_transformers import SentenceTransformer

    from tct_hf import encode_corpus
    from tct_hf.training.stages import process_state

    replace = os.replace
    if killed:
        os.replace = lambda *args: _die() if os.path.basename(args[1]) == killed else replace(*args)
    state = process_state()
    corpus = _killed_while_reading() if killed == "read" else passages()
    encode_corpus(
        SentenceTransformer(model, device="cpu"), corpus, output, precision="fp32", shard_size=SHARD, state=state
    )
    print(f"process {state.process_index} of {state.num_processes}", flush=True)
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
