"""A small expander that begins from nothing: the same one every time."""

from __future__ import annotations

import random

from tct_hf.expander_training import new_expander
from tct_hf.recipe_settings import ExpanderSizes


def test_the_same_texts_make_the_same_tokenizer_and_weights() -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(2000)]
    texts = [" ".join(draw.choices(words, k=20)) for _ in range(400)]
    sizes = ExpanderSizes(vocabulary=500, d_model=16, layers=1, heads=2, d_ff=32)
    (model, tokenizer), (again, tokenizer_again) = (new_expander(texts, sizes, seed=1) for _ in range(2))
    # A run that goes on makes its tokenizer anew: its checkpoint's embeddings must be of the same vocabulary.
    assert tokenizer.backend_tokenizer.to_str() == tokenizer_again.backend_tokenizer.to_str()
    assert all(bool((one == other).all()) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"], skip_special_tokens=True) == texts[0]
