"""A seq2seq model that writes queries of passages (doc2query), trained on judged pairs; resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from tct_hf.retrieval.miner import positive_rows
from tct_hf.training.resumable import ResumableTrainer
from tct_hf.training.stages import Stage

if TYPE_CHECKING:
    from tct_hf.data.collection import Collection


class ExpanderTrainer(ResumableTrainer, Seq2SeqTrainer):  # type: ignore[misc]
    """transformers' seq2seq trainer, resumable."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # T5 and models like it take any keyword and average over the batch at hand all the same. Believed to divide by
        # the tokens of all batches of a step, they would add up losses and gradients where a mean is meant.
        self.model_accepts_loss_kwargs = False


def expander_pairs(collection: Collection, use: str = "train") -> Dataset:
    """The relevant pairs of a split, "train" or "dev", in the order of its judgements: columns passage and query."""
    split = collection.splits.get(use)
    row_of = {passage_id: row for row, passage_id in enumerate(collection.corpus["id"])}
    positives = positive_rows(split.queries, split.qrels, row_of) if split is not None else {}
    if split is None or not positives:
        raise ValueError(f"{collection.name}: no {use} query has a relevant passage; there is nothing to train on.")
    texts = collection.corpus["text"]
    pairs = [(texts[row], split.queries[query_id]) for query_id, rows in positives.items() for row in rows]
    return Dataset.from_dict({"passage": [passage for passage, _ in pairs], "query": [query for _, query in pairs]})


def expander_texts(collection: Collection) -> Iterator[str]:
    """What the tokenizer of a new model is trained on: passages and train queries."""
    for batch in collection.corpus.select_columns("text").iter(1000):
        yield from batch["text"]
    if "train" in collection.splits:
        yield from collection.splits["train"].queries.values()


def new_expander(
    texts: Iterable[str], *, seed: int, vocabulary: int, d_model: int, layers: int, heads: int, d_ff: int
) -> tuple[Any, Any]:
    """A small T5 with random weights, and a tokenizer trained on some texts: for where no checkpoint can be had."""
    sizes = {"vocabulary": vocabulary, "d_model": d_model, "layers": layers, "heads": heads, "d_ff": d_ff}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"sizes.{name} must be at least 1, got {size}.")
    if d_model % heads:
        raise ValueError(f"sizes.d_model is {d_model}, which {heads} heads don't divide.")
    special = ["<pad>", "</s>", "<unk>"]
    # Not Unigram: its trainer gives another vocabulary each time, and a run that goes on makes its tokenizer again.
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    wrapped.model_input_names = ["input_ids", "attention_mask"]
    set_seed(seed)
    undeclared: dict[str, Any] = {"decoder_start_token_id": 0}  # T5 reads it, T5Config does not declare it
    config = T5Config(
        vocab_size=len(wrapped),
        d_model=d_model,
        d_kv=d_model // heads,
        d_ff=d_ff,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        pad_token_id=0,
        eos_token_id=1,
        **undeclared,
    )
    return T5ForConditionalGeneration(config), wrapped


def train_expander(
    stage: Stage,
    make_model: Callable[[], tuple[Any, Any]],
    pairs: Dataset,
    dev_pairs: Dataset | None = None,
    *,
    passage_length: int = 512,
    query_length: int = 64,
    prompt: str = "",
) -> Path:
    """Train a model of `make_model`, with its tokenizer, to write a passage's query; its folder.

    Source: Nogueira and Lin, From doc2query to docTTTTTquery, 2019.
    """
    if stage.arguments.get("push_to_hub"):
        raise ValueError("training.push_to_hub: releases are of students; upload the finished folder yourself.")

    def make() -> ExpanderTrainer:
        model, tokenizer = make_model()

        def tokens(batch: dict[str, list[str]]) -> dict[str, Any]:
            inputs = tokenizer(
                [prompt + text for text in batch["passage"]], truncation=True, max_length=passage_length
            )
            labels = tokenizer(text_target=batch["query"], truncation=True, max_length=query_length)
            return {**{name: inputs[name] for name in ("input_ids", "attention_mask")}, "labels": labels["input_ids"]}

        return ExpanderTrainer(
            model=model,
            args=stage.args(Seq2SeqTrainingArguments, remove_unused_columns=False),
            # Tokenised as they are asked for: no copy of the pairs in tokens, whatever their number.
            train_dataset=pairs.with_transform(tokens),
            eval_dataset=None if dev_pairs is None else dev_pairs.with_transform(tokens),
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),  # pads to the longest of a batch
        )

    return stage.train(make)
