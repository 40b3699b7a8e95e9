"""Tiny models made on the spot: no download, a few thousand parameters each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?()[]'\"-_/检索搜中文"
WORDS = [
    "the", "a", "what", "is", "of", "passage", "query", "retrieval", "dense", "teacher", "student", "distillation",
    "representations", "tokens",
]  # fmt: skip
# Sizes with the same names in several families.
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
NAMES = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")


def _write_json(file: Path, **content: Any) -> None:
    file.write_text(json.dumps(content))


def _save_fast(path: Path, tokenizer: Tokenizer, special: list[str], **more: Any) -> None:
    """A tokenizer whose special tokens are those of NAMES, in this order."""
    named = dict(zip(NAMES, special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named, **more).save_pretrained(path)


def wordpiece_vocabulary(special: list[str]) -> dict[str, int]:
    pieces = [*special, "[unused0]", "[unused1]", *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def _wordpiece(special: list[str], unknown: str = "[UNK]") -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(wordpiece_vocabulary(special), unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _save_bert_tokenizer(path: Path) -> int:
    path.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = _wordpiece(special)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path / "tokenizer.json"))
    tokens = {name: f"[{name[:3].upper()}]" for name in ("cls_token", "sep_token", "pad_token", "unk_token")}
    _write_json(
        path / "tokenizer_config.json",
        tokenizer_class="BertTokenizer", do_lower_case=True, model_max_length=192, mask_token="[MASK]", **tokens,
    )  # fmt: skip
    vocabulary = wordpiece_vocabulary(special)
    (path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    return len(vocabulary)


def _save_model(path: Path, kind: Any, config: Any, seed: int) -> Path:
    torch.manual_seed(seed)
    kind(config).save_pretrained(path)
    return path


def tiny_bert(
    path: Path, *, layers: int = 2, dropout: float = 0.0, seed: int = 0, hidden: int = 32, kind: Any = BertModel
) -> Path:
    size = _save_bert_tokenizer(path)
    sizes = {**SIZES, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(vocab_size=size, max_position_embeddings=192, initializer_range=0.2, **sizes, **drop)
    return _save_model(path, kind, config, seed)


def tiny_mlm(path: Path, *, layers: int = 2, dropout: float = 0.0, seed: int = 6, hidden: int = 32) -> Path:
    """An encoder with its masked-language-model head, for sparse students."""
    return tiny_bert(path, layers=layers, dropout=dropout, seed=seed, hidden=hidden, kind=BertForMaskedLM)


def tiny_mpnet(path: Path) -> Path:
    """A WordPiece encoder with RoBERTa's special tokens and positions."""
    special = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
    tokenizer = _wordpiece(special)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    _save_fast(path, tokenizer, special, bos_token="<s>", eos_token="</s>", model_max_length=192)
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    size = len(wordpiece_vocabulary(special))
    config = MPNetConfig(vocab_size=size, max_position_embeddings=194, **SIZES, **drop, **ids)
    return _save_model(path, MPNetModel, config, 1)


def tiny_distilbert(path: Path) -> Path:
    """An encoder of another family with BERT's tokenizer."""
    size = _save_bert_tokenizer(path)
    sizes: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    config = DistilBertConfig(vocab_size=size, max_position_embeddings=192, initializer_range=0.2, **sizes)
    return _save_model(path, DistilBertModel, config, 8)


def byte_level(special: list[str], words: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer, trained on a few words, of which some begin lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = {"special_tokens": special, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, **alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS), *words] * 50, trainer)
    return tokenizer


def tiny_roberta(path: Path) -> Path:
    """An encoder with a byte-level BPE tokenizer."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = byte_level(special)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    _save_fast(path, tokenizer, special, bos_token="<s>", eos_token="</s>")
    config = RobertaConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=194, pad_token_id=1, **SIZES)
    return _save_model(path, RobertaModel, config, 2)


def tiny_modernbert(path: Path, *, dropout: float = 0.0) -> Path:
    """An encoder of another family, its tokenizer byte-level BPE with BERT's special tokens."""
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    tokenizer = byte_level(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    _save_fast(path, tokenizer, special, model_input_names=["input_ids", "attention_mask"])
    drop = dict.fromkeys(("embedding_dropout", "mlp_dropout", "attention_dropout"), dropout)
    ids = {"pad_token_id": 1, "bos_token_id": 0, "cls_token_id": 0, "eos_token_id": 2, "sep_token_id": 2}
    attention = {"local_attention": 8, "global_attn_every_n_layers": 2, "max_position_embeddings": 192}
    sizes = {**SIZES, "num_hidden_layers": 3, "vocab_size": tokenizer.get_vocab_size(), "initializer_range": 0.2}
    return _save_model(path, ModernBertModel, ModernBertConfig(**sizes, **drop, **attention, **ids), 6)


def tiny_colbert(path: Path, *, seed: int = 3, layers: int = 2, dropout: float = 0.0) -> Path:
    """A ColBERT of this package: the students' own tokens."""
    from tct_hf import build_colbert

    base = tiny_bert(path / "base", seed=seed, layers=layers, dropout=dropout)
    torch.manual_seed(seed)
    build_colbert(str(base), encoding="tct", dim=16, document_length=64).save_pretrained(str(path / "colbert"))
    return path / "colbert"


def tiny_cross_encoder(path: Path, *, seed: int = 9, labels: int = 1) -> Path:
    """A cross-encoder as transformers saves one."""
    base = tiny_bert(path, seed=seed)
    torch.manual_seed(seed)
    config = BertConfig.from_pretrained(base, num_labels=labels)
    model = BertForSequenceClassification.from_pretrained(base, config=config)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(base)
    return base


def tiny_causal(path: Path, *, seed: int = 4, chat: bool = False) -> Path:
    """A causal language model without a padding token, whose words "yes" and "no" are tokens."""
    tokenizer = byte_level(["<s>", "</s>"], ["yes", "no"])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 192}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    if chat:
        fast.chat_template = "<s>{% for one in messages %}{{ one.content }}{% endfor %}</s>{{ enable_thinking }}"
    fast.save_pretrained(path)
    config = LlamaConfig(vocab_size=len(fast), max_position_embeddings=192, initializer_range=0.2, **SIZES)
    return _save_model(path, LlamaForCausalLM, config, seed)


def stanford_colbert(path: Path) -> Path:
    """A checkpoint as the Stanford code writes it: encoder and projection in one file, artifact.metadata."""
    from safetensors.torch import save_file

    base = tiny_bert(path, seed=4)
    model = BertModel.from_pretrained(base)
    torch.manual_seed(4)
    weights = {f"bert.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights["linear.weight"] = torch.randn(16, 32) * 0.2
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["architectures"] = ["HF_ColBERT"]
    (path / "config.json").write_text(json.dumps(config))
    _write_json(
        path / "artifact.metadata",
        query_maxlen=32, doc_maxlen=60, dim=16, mask_punctuation=True, attend_to_mask_tokens=False,
        query_token_id="[unused0]", doc_token_id="[unused1]",
    )  # fmt: skip
    return path


def pylate_colbert(path: Path) -> Path:
    """A checkpoint as PyLate 1 writes it: Transformer and Dense, markers as added tokens, its own model type."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    base = tiny_bert(path, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["[Q] ", "[D] "])
    model = BertModel.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    _write_json(path / "sentence_bert_config.json", max_seq_length=59, do_lower_case=False)
    modules = (("", "sentence_transformers.models.Transformer"), ("1_Dense", "pylate.models.Dense.Dense"))
    listed = [{"idx": at, "name": str(at), "path": place, "type": kind} for at, (place, kind) in enumerate(modules)]
    (path / "modules.json").write_text(json.dumps(listed))
    (path / "1_Dense").mkdir()
    identity = "torch.nn.modules.linear.Identity"
    _write_json(
        path / "1_Dense" / "config.json", in_features=32, out_features=16, bias=False, activation_function=identity
    )
    torch.manual_seed(5)
    save_file({"linear.weight": torch.randn(16, 32) * 0.2}, path / "1_Dense" / "model.safetensors")
    _write_json(
        path / "config_sentence_transformers.json",
        __version__={"sentence_transformers": "4.0.2", "transformers": "4.48.2", "pytorch": "2.5.1"},
        prompts={}, default_prompt_name=None, similarity_fn_name="MaxSim", query_prefix="[Q] ", document_prefix="[D] ",
        query_length=32, document_length=60, attend_to_expansion_tokens=False, skiplist_words=list("!?.,:;"),
        model_type="ColBERT",
    )  # fmt: skip
    return path


def load_colbert(path: Path) -> MultiVectorEncoder:
    return MultiVectorEncoder(str(path), device="cpu")


def tiny_t5(path: Path, *, seed: int = 9) -> Path:
    """A seq2seq model with a tokenizer of whole words, whose queries differ from passage to passage and end."""
    words = ["<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(path)  # fmt: skip
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2}
    config = T5Config(vocab_size=len(words), num_heads=2, decoder_start_token_id=0, initializer_factor=1.5, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(path)
    return path
