"""What a model's outputs depend on, in few bytes: digests of weights and tokenizers."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def weights_digest(model: Any) -> str:
    """The sha256, in hex, over name, type, shape and values of all weights of a torch module."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str | None:
    """The sha256, in hex, over the rules and vocabulary of a fast tokenizer; None where there is none.

    Padding and truncation are left out: every call to the tokenizer sets them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        return None
    content = json.loads(backend.to_str())
    content.pop("truncation", None)
    content.pop("padding", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
