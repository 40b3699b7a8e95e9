"""Encode a small corpus into a folder, in one process or under `accelerate launch`, and maybe be killed on the way.

python -m tests.encode_worker MODEL OUTPUT [KILLED [INDEX JOBS]]

KILLED: the name of a file; the process ends before it is put in place.
INDEX JOBS: this is one of several jobs.
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


def main(model: str, output: str, killed: str = "", index: str = "", jobs: str = "") -> None:
    import torch

    torch.set_num_threads(1)
    from sentence_transformers import SentenceTransformer

    from tct_hf import encode_corpus
    from tct_hf.training.stages import process_state

    replace = os.replace
    if killed:

        def put(source: str, target: str) -> None:
            if os.path.basename(target) == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = put  # type: ignore[assignment]
    state = process_state()
    encoder = SentenceTransformer(model, device="cpu")
    job = (int(index), int(jobs)) if jobs else None
    encode_corpus(encoder, passages(), output, precision="fp32", shard_size=SHARD, job=job, state=state)
    print(f"process {state.process_index} of {state.num_processes}", flush=True)
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
