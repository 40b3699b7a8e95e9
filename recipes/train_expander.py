"""Train a seq2seq model to write queries of passages (doc2query), on the judged train pairs of a collection.

accelerate launch recipes/train_expander.py [settings.yaml] --data.source PATH --output_dir DIR [--setting value ...]

Writes DIR/expander, which recipes/expand.py takes as --model. --from_scratch begins with a small T5 of its own, with a
tokenizer trained on the collection, where no checkpoint can be had. If it is stopped, the same command resumes
where it stopped.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tct_hf.pipeline import one_row
from tct_hf.pipeline.settings import TRAINING as SHARED
from tct_hf.pipeline.settings import DataSettings
from tct_hf.settings import SettingsError, run_recipe, setting


@dataclass
class ExpanderSizes:
    vocabulary: int = setting(
        8000, "size of its vocabulary; the tokenizer is trained on the passages and train queries"
    )
    d_model: int = setting(256, "hidden size")
    layers: int = setting(4, "layers of the encoder, and of the decoder")
    heads: int = setting(4, "attention heads")
    d_ff: int = setting(1024, "size of the feed-forward layers")


@dataclass
class Settings:
    output_dir: str = setting("outputs/train_expander", "where everything is written")
    model: str = setting("google-t5/t5-base", "folder or Hub id of the initial seq2seq model")
    from_scratch: bool = setting(False, "start from a small T5 with random weights instead of model")
    sizes: ExpanderSizes = field(default_factory=ExpanderSizes)  # of that T5, about 11 million weights by default
    passage_length: int = setting(512, "maximum length of a passage in tokens")
    query_length: int = setting(64, "maximum length of a query in tokens")
    prompt: str = setting("", "prefix of each passage; recipes/expand.py then needs the same")
    seed: int = setting(13, "random seed of new weights, batches and dropout")
    precision: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "precision of training; auto: bf16 where the hardware has it"
    )
    data: DataSettings = field(default_factory=DataSettings)
    training: dict[str, Any] = setting({}, "training arguments", keys_of="transformers:Seq2SeqTrainingArguments")


# docTTTTTquery's: a constant learning rate of 1e-4 and batches of 256 (here 32, eight times over), AdamW instead of
# Adafactor. Its 4,000 steps are 2 epochs of MS MARCO; a collection decides by its own size.
TRAINING: dict[str, Any] = {
    **SHARED,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "num_train_epochs": 2,
}


def main(settings: Settings) -> None:
    from tct_hf.data.expander import load_expander
    from tct_hf.pipeline.data import read_collection
    from tct_hf.pipeline.job import Job
    from tct_hf.training import expander as training
    from tct_hf.training.stages import Stage, precision

    sizes = {f"sizes.{name}": size for name, size in asdict(settings.sizes).items()}
    lengths = {"passage_length": settings.passage_length, "query_length": settings.query_length}
    for name, size in {**lengths, **sizes}.items():
        if size < 1:
            raise SettingsError(f"{name}: must be at least 1, got {size}")
    job, output = Job(["data", "train"]), Path(settings.output_dir)
    with job.first("data"):
        collection = read_collection(settings.data, test=False)
        job.write(f"  {collection.summary()}")
        pairs = training.expander_pairs(collection)
        job.write(f"  {len(pairs):,} pairs of a passage and its query")
    base = {**TRAINING, "seed": settings.seed, **precision(settings.precision, job.state.device)}
    arguments = {**base, **settings.training}

    def make_model() -> tuple[Any, Any]:
        if settings.from_scratch:
            texts = training.expander_texts(collection)
            return training.new_expander(texts, seed=settings.seed, **asdict(settings.sizes))
        return load_expander(settings.model, dtype="float32")

    begun = {"sizes": asdict(settings.sizes)} if settings.from_scratch else {"model": settings.model}
    read = {"prompt": settings.prompt, "data": settings.data.of_trained, "corpus": collection.fingerprint["sha256"]}
    depends = {**begun, **lengths, **read, **arguments}
    stage = Stage(output / "expander", output / "training", settings=depends, arguments=arguments, write=job.write)
    with job.stage("train"):
        evaluates = arguments.get("eval_strategy", "no") not in ("no", False)
        dev = training.expander_pairs(collection, "dev") if evaluates else None
        final = training.train_expander(stage, make_model, pairs, dev, prompt=settings.prompt, **lengths)
    job.record(settings, corpus=collection.fingerprint)
    if job.is_main:
        print(f"\n{table(final, len(pairs), settings)}", flush=True)
    job.finish()


def table(final: Path, pairs: int, settings: Settings) -> str:
    from tct_hf.files import LOG_FILE, read_json
    from tct_hf.progress import human_duration

    log = read_json(final / LOG_FILE, f"delete {final}, and run again.", kind=list)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    dev = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    cells = {
        "begun with": "nothing" if settings.from_scratch else settings.model,
        "pairs": f"{pairs:,}",
        "steps": f"{log[-1]['step']:,}",
        "last loss": f"{losses[-1]:.3f}" if losses else "",
        **({"dev loss": f"{dev[-1]:.3f}"} if dev else {}),  # measured where training.eval_strategy asks for it
        "trained for": human_duration(log[-1]["seconds"]),
        "folder": str(final),
    }
    return one_row(cells)


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)
