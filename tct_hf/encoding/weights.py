"""Weights of a model: what it computes in, float32 or bfloat16 where the hardware has it, and digests for records."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tct_hf.files import json_digest

logger = logging.getLogger(__name__)

if hasattr(os, "register_at_fork"):
    # A child has none of the threads of its parent's pool, and would wait for them for ever.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16 (elsewhere it is emulated, and slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not tell
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """What a setting of "auto", "bfloat16" or "float32" comes to on a device."""
    if dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f'dtype={dtype!r} is not known: use "auto", "bfloat16" or "float32".')
    wanted = dtype == "bfloat16" or (dtype == "auto" and has_bfloat16(device))
    return torch.bfloat16 if wanted else torch.float32


@contextmanager
def half_attention(device: torch.device) -> Iterator[None]:
    """Let attention with dropout stay in half precision: a CPU's is in float32 by default, in 1.6 times the time.

    It then rounds as transformers' "eager" attention does. Other attention, and dropout, are as they were.
    """
    cuda: Any = torch.backends.cuda  # by name: the setting is of all devices; torch 2.4 has none
    if device.type != "cpu" or not hasattr(cuda, "allow_fp16_bf16_reduction_math_sdp"):
        yield
        return
    before = cuda.fp16_bf16_reduction_math_sdp_allowed()
    cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        yield
    finally:
        cuda.allow_fp16_bf16_reduction_math_sdp(before)


def set_dropout(model: torch.nn.Module, probability: float) -> None:
    """Give all dropout of a model, of attention and layers too, a probability; a saved model keeps its own."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
            setattr(module, name, probability)


def unpack_half(model: torch.nn.Module, kept: torch.dtype = torch.float32) -> None:
    """Make half-precision weights float32, in place, unless all of them are of the dtype `kept`.

    Autocast only goes down, transformers keeps the half precision that a checkpoint was saved in, and CPUs lack
    operations in float16.
    """
    types = {weight.dtype for weight in model.parameters()}
    if types & {torch.float16, torch.bfloat16} and types != {kept}:
        model.float()


def master_weights(model: Any) -> Any:
    """Make a model that will be trained float32: an update is often too small for half precision to take it in."""
    trained = {one.dtype for one in model.parameters() if one.requires_grad}
    half = next((dtype for dtype in trained if dtype.is_floating_point and dtype.itemsize < 4), None)
    if half is not None:
        logger.warning(f"The weights are {half}: they are trained as float32. Set bf16=True to compute in bfloat16.")
        model.float()
    return model


def refuse_not_finite(weights: Iterable[tuple[str, torch.Tensor]], what: str) -> None:
    """Refuse weights that are NaN or infinite; `what` they are of begins the message."""
    for name, tensor in weights:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"{what} has weights that are not finite ({name}), so all its vectors would be NaN: train it again "
                "with a lower learning_rate, or take an earlier checkpoint."
            )


def refuse_broken_files(folder: Path) -> None:
    """Refuse a saved model whose files hold weights that are NaN or infinite."""
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(str(file), framework="pt") as weights:
            refuse_not_finite(((name, weights.get_tensor(name)) for name in weights.keys()), str(file))  # noqa: SIM118


def weights_digest(model: Any) -> str:
    """The sha256, in hex, over name, type, shape and values of all weights of a torch module.

    Weights in half precision count as the float32 ones that they become before a model encodes.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
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
    return json_digest(content)
