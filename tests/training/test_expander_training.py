"""A small expander that begins from nothing: the same one every time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import T5ForConditionalGeneration

from tct_hf.files import LOG_FILE
from tct_hf.training.expander import new_expander, train_expander
from tests.train_helpers import make_stage

SIZES = {"vocabulary": 60, "d_model": 16, "layers": 1, "heads": 2, "d_ff": 32}


def test_the_same_texts_make_the_same_tokenizer_and_weights() -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(2000)]
    texts = [" ".join(draw.choices(words, k=20)) for _ in range(400)]
    sizes = {**SIZES, "vocabulary": 500}
    (model, tokenizer), (again, tokenizer_again) = (new_expander(texts, seed=1, **sizes) for _ in range(2))
    # A run that goes on makes its tokenizer anew: its checkpoint's embeddings must be of the same vocabulary.
    assert tokenizer.backend_tokenizer.to_str() == tokenizer_again.backend_tokenizer.to_str()
    assert all(bool((one == other).all()) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"], skip_special_tokens=True) == texts[0]


@pytest.mark.parametrize("size", ["layers", "heads", "vocabulary"])
def test_a_size_below_one_is_refused(size: str) -> None:
    with pytest.raises(ValueError, match=f"sizes.{size} must be at least 1, got 0"):
        new_expander(["how to sort an array"], seed=1, **{**SIZES, size: 0})


def test_a_step_of_several_batches_is_a_step_of_their_mean(tmp_path: Path) -> None:
    texts = ["how to sort an array", "how to draw a line", "how to open a file", "how to read a table"]

    def make_model() -> tuple[Any, Any]:
        model, tokenizer = new_expander(texts, seed=1, **SIZES)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):  # of attention
                module.dropout = 0.0
        return model, tokenizer

    def trained(name: str, batch: int, batches: int) -> tuple[float, dict[str, torch.Tensor]]:
        arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": batches, "max_steps": 1}
        arguments |= {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        stage = make_stage(tmp_path / name, arguments=arguments)
        pairs = Dataset.from_dict({"passage": texts, "query": texts})
        final = train_expander(stage, make_model, pairs, query_length=4)  # of all: the mean of means is the mean
        weights = T5ForConditionalGeneration.from_pretrained(final).state_dict()
        return json.loads((final / LOG_FILE).read_text())[0]["loss"], weights

    model, tokenizer = make_model()
    passages = tokenizer(texts, padding=True, return_tensors="pt")
    labels = torch.tensor(tokenizer(texts, truncation=True, max_length=4)["input_ids"])
    with torch.no_grad():
        logits = model(**passages, labels=labels).logits.double()
    expected = float(-logits.log_softmax(-1).gather(-1, labels[..., None]).mean())
    (loss, weights), (whole, of_whole) = trained("parts", 1, 4), trained("whole", 4, 1)
    assert loss == pytest.approx(expected, rel=1e-4) and whole == pytest.approx(expected, rel=1e-4)
    for name, one in weights.items():
        torch.testing.assert_close(one, of_whole[name], rtol=1e-4, atol=1e-6)
