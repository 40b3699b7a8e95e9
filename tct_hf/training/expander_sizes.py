"""The shape of a new expander, apart from its training: a recipe's --help reads it, and must not load torch."""

from __future__ import annotations

from dataclasses import dataclass

from tct_hf.settings import setting


@dataclass
class ExpanderSizes:
    """The shape of a T5 that begins from nothing; about 11 million weights as it is."""

    vocabulary: int = setting(8000, "pieces of its tokenizer, which is trained on the passages and train queries")
    d_model: int = setting(256, "dimensions of a token")
    layers: int = setting(4, "of the encoder, and of the decoder")
    heads: int = setting(4, "of attention")
    d_ff: int = setting(1024, "dimensions between")
