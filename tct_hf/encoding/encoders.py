"""An encoder made ready for a student or a ColBERT: the layers it keeps, its tokenizer, its lengths."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.base.modules.module import Module
from sentence_transformers.base.modules.transformer import QueryExpansionConfig
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from tct_hf.encoding.kinds import PROMPTS, kind_of
from tct_hf.encoding.routes import route_of
from tct_hf.hub_client import check_model_folder

QUERY_LENGTH = 36
DOCUMENT_LENGTH = 154

# Starts of texts that a tokenizer might join with the end of a prompt: letters, a digit, punctuation, an accent,
# an ideograph, a space.
_PROBES = ("a", "the", "word", "Word", "1", ".", "é", "中", " x", "")

# In errors of a device, which no file is to blame for.
_OF_A_DEVICE = re.compile(r"CUDA|cuda|cuDNN|CUBLAS|NCCL|NVIDIA|HIP error|\b(MPS|XPU)\b")

_SPECIAL = ("unk_token", "bos_token", "eos_token", "sep_token", "pad_token", "cls_token", "mask_token")


def query_expansion(length: int) -> QueryExpansionConfig:
    """Query augmentation as a setting of the stock Transformer module: [MASK]s up to `length` tokens, attended."""
    return {"strategy": "fixed", "attend": True, "token": None, "length": length}


@contextmanager
def told_of_files(name_or_path: str) -> Iterator[None]:
    """Say in one sentence which model can't be loaded, and which file of it the libraries can't use."""
    check_model_folder(name_or_path)
    kind_of(name_or_path)  # refuses what its small files say wrong, and a repository that can't be read
    try:
        yield
    except OSError as error:
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"{name_or_path}: no model can be loaded, from a folder or from the Hub ({first})") from error
    except (ImportError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, (RuntimeError, AssertionError)) and _OF_A_DEVICE.search(str(error)):
            raise
        raise ValueError(f"{name_or_path}: {_what_is_wrong(name_or_path, error)}") from error


def _what_is_wrong(name_or_path: str, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # the libraries load nothing but tensors
        return "its weights hold more than tensors, which could be code to run: get the checkpoint in safetensors."
    if "trust_remote_code" in str(error):
        return "needs code of its author (trust_remote_code), which is not run; name another model."
    blamed = "config.json, modules.json, sentence_bert_config.json, config_sentence_transformers.json or the weights"
    try:
        AutoTokenizer.from_pretrained(name_or_path)
    except Exception:
        with suppress(Exception):
            AutoConfig.from_pretrained(name_or_path)
            blamed = "tokenizer_config.json or tokenizer.json"
    why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return f"{blamed} can't be used ({why}); download or save the checkpoint again."


def load_transformer(model_name_or_path: str, **options: Any) -> Transformer:
    """The encoder of a folder or Hub id, in float32."""
    # transformers would keep a half-precision checkpoint's dtype: training in it loses small updates.
    with told_of_files(model_name_or_path):
        transformer = Transformer(model_name_or_path, model_kwargs={"dtype": torch.float32}, **options)
        with torch.no_grad(), _as_it_was(transformer.tokenizer):
            transformer(transformer.preprocess(["a"]))  # some of what its files say is read only now
    return transformer


def load_model(model_class: Any, name_or_path: str, **options: Any) -> Any:
    """A model of sentence-transformers, tried on a word: some of what its files say is read only then."""
    with told_of_files(name_or_path):
        model = model_class(name_or_path, **options)
        if all(weight.dtype == torch.float32 for weight in model.parameters()):  # a CPU may have no other
            with _as_it_was(getattr(model, "tokenizer", None)):
                _try(model)
    return model


def _try(model: Any) -> None:
    if isinstance(model, CrossEncoder):
        model.predict([("a", "a")], show_progress_bar=False)
        return
    for encode in (model.encode_query, model.encode_document):
        vectors = encode(["a"], show_progress_bar=False)
    if isinstance(model, SentenceTransformer):
        said, found = model.get_embedding_dimension(), vectors.shape[1]
        if said not in (None, found):
            raise ValueError(f"its vectors have {found} dimensions, not {said!r}")


@contextmanager
def _as_it_was(tokenizer: Any) -> Iterator[None]:
    """Keep the truncation and padding of a tokenizer, which are saved with it, from what is encoded meanwhile."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    before = None if backend is None else (backend.truncation, backend.padding)
    yield
    if backend is not None and before is not None:
        truncation, padding = before
        backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
        backend.enable_padding(**padding) if padding else backend.no_padding()


def make_tct(
    transformer: Transformer,
    *,
    query_length: int | None,
    document_length: int | None,
    query_augmentation: bool,
    markers: Sequence[str] = (),
) -> None:
    """Give a Transformer module, in place, the TCT tokenizer, lengths and query expansion."""
    query_length, document_length = query_length or QUERY_LENGTH, document_length or DOCUMENT_LENGTH
    for name, length in (("query_length", query_length), ("document_length", document_length)):
        check_length(transformer.config, name, length, taken=4)
    tokenizer = tct_tokenizer(transformer.tokenizer, document_length=document_length, markers=markers)
    tokens = [str(tokenizer.cls_token or tokenizer.bos_token)]
    if query_augmentation:
        if tokenizer.mask_token is None:
            raise ValueError(
                f"{tokenizer.name_or_path!r} has no mask token for query augmentation: set query_augmentation=False."
            )
        tokens.append(str(tokenizer.mask_token))
    encoder: Any = transformer.model
    rows = encoder.get_input_embeddings().num_embeddings
    for token in tokens:
        if tokenizer.backend_tokenizer.token_to_id(token) >= rows:
            raise ValueError(
                f"The token {token!r} of {tokenizer.name_or_path!r} has no embedding: the encoder has {rows}. Use the "
                "tokenizer that it was trained with."
            )
    _set(transformer, tokenizer, query_length, document_length, augmented=query_augmentation)


def make_own(transformer: Transformer, *, markers: Sequence[str] = ()) -> None:
    """Give a ColBERT's Transformer module, in place, what an embedding model has.

    That is no query expansion, one length, and a tokenizer without the markers, with the encoder's special tokens.
    """
    length: Any = transformer.document_length or transformer.max_seq_length
    tokenizer = _fast(transformer.tokenizer)
    start = tokenizer.cls_token or tokenizer.bos_token
    if start and tokenizer("a")["input_ids"] == tokenizer(f"{start}a", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} adds {start!r} and no more, which is the TCT encoding's "
            'input: use encoding="tct".'
        )
    if markers:
        tokenizer = _made_of(_without_added_tokens(tokenizer.backend_tokenizer, markers), tokenizer, length)
    tokenizer.model_max_length = length
    _set(transformer, tokenizer, transformer.query_length, None, augmented=False)


def _set(
    transformer: Transformer, tokenizer: Any, query_length: int | None, document_length: int | None, *, augmented: bool
) -> None:
    transformer.processor = tokenizer
    transformer.processing_kwargs = {}
    transformer._prompt_length_mapping = {}
    transformer.query_expansion = None  # before the lengths: the setter compares them
    transformer.document_length = document_length
    transformer.query_length = None if augmented else query_length
    transformer.query_expansion = query_expansion(query_length) if augmented and query_length else None


def set_lengths(
    transformer: Any, prompts: Mapping[str, str | None], *, query_length: int | None, document_length: int | None
) -> None:
    """Set the tokens that a query and a passage keep, in place, where they are given.

    A passage's length is the tokenizer's, so that plain `encode` and servers truncate in the same way. A query's is a
    setting that only sentence-transformers 6 knows.
    """
    for side, length in (("query", query_length), ("document", document_length)):
        if length is not None:
            taken = len(transformer.tokenizer(prompts.get(side) or "")["input_ids"])
            check_length(transformer.config, f"{side}_length", length, taken=taken)
    if document_length is not None:
        transformer.max_seq_length = document_length
        if transformer.document_length is not None:
            transformer.document_length = document_length
    if query_length is not None:
        transformer.query_length = None if query_length == transformer.max_seq_length else query_length


def check_length(config: Any, name: str, length: int, *, taken: int) -> None:
    """Refuse a length that leaves no room beside the `taken` tokens, or exceeds the encoder's positions."""
    if length <= taken:
        raise ValueError(f"{name}={length} leaves no token for the text: special tokens and the prompt take {taken}.")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= config.pad_token_id + 1  # these count positions from the padding index on
    if positions is not None and length > positions:
        raise ValueError(f"{name}={length}, but the encoder has {positions} positions: choose at most that.")


def keep_layers(model: Any, layers: Sequence[int] | None) -> None:
    """Leave an encoder, in place, with these layers, counted from 0; None: all."""
    if layers is None:
        return
    config = model.config
    count = config.num_hidden_layers
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < count for layer in layers):
        raise ValueError(f"layers={list(layers)}: name distinct layers of the encoder, 0 to {count - 1}.")
    stacks = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    stacks = {name: stack for name, stack in stacks.items() if len(stack) == count}
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} stacks of {count} layers: use one with one, or layers=None."
        )
    [(name, stack)] = stacks.items()
    model.set_submodule(name, nn.ModuleList([stack[layer] for layer in layers]))
    config.num_hidden_layers = len(layers)
    for key, value in list(vars(config).items()):  # per-layer settings, such as ModernBERT's layer_types
        if key.startswith("layer") and isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[layer] for layer in layers])
    with torch.device("meta"):  # no memory
        loaded = type(model)(config)
    found, wanted = ({(key, one.shape) for key, one in made.named_parameters()} for made in (model, loaded))
    if found != wanted:
        raise ValueError(
            f"layers={list(layers)}: the layers of {type(model).__name__} differ, and at its new place "
            f"{min(found ^ wanted)[0]} would be lost, or random: keep that layer at its place, or layers=None."
        )


def tct_post_processor(tokenizer: Tokenizer, token: str) -> TemplateProcessing:
    """What adds special tokens to a text: the start token only, no `[SEP]`."""
    if tokenizer.token_to_id(token) is None:
        raise ValueError(
            f"{token!r}, the first token of every input, is not in the vocabulary: set tokenizer.cls_token to one."
        )
    special: Any = [(token, tokenizer.token_to_id(token))]
    return TemplateProcessing(single=f"{token} $A", pair=f"{token} $A $B:1", special_tokens=special)


def tct_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, *, document_length: int, markers: Iterable[str] = ()
) -> TokenizersBackend:
    """A fresh tokenizer for TCT input, made from any fast tokenizer, which stays unchanged.

    Its class is `TokenizersBackend`, because model-specific classes (`BertTokenizer`) put `[SEP]` back on load. It
    truncates at `document_length`; `markers` are added tokens to leave out, such as the `[unused0]` of a ColBERT.
    """
    tokenizer = _fast(tokenizer)
    start = tokenizer.cls_token or tokenizer.bos_token
    if start is None:
        raise ValueError(f"{tokenizer.name_or_path!r} has neither a cls_token nor a bos_token: use a BERT-like one.")
    backend = _without_added_tokens(tokenizer.backend_tokenizer, markers)
    backend.post_processor = tct_post_processor(backend, start)
    fresh = _made_of(backend, tokenizer, document_length)
    _check_prompts(fresh)
    return fresh


def _fast(tokenizer: PreTrainedTokenizerBase | None) -> Any:
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            f"{type(tokenizer).__name__} is not of the tokenizers library: use one with a tokenizer.json."
        )
    return tokenizer


def _without_added_tokens(backend: Tokenizer, markers: Iterable[str]) -> Tokenizer:
    """A copy in which the markers are ordinary text again, as in the tokenizer of the base model."""
    wanted = {marker.strip() for marker in markers} - {""}
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"].strip() not in wanted]
    state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))


def _made_of(backend: Tokenizer, tokenizer: PreTrainedTokenizerBase, document_length: int) -> TokenizersBackend:
    special = {name: getattr(tokenizer, name) for name in _SPECIAL if getattr(tokenizer, name) is not None}
    return TokenizersBackend(
        tokenizer_object=backend,
        name_or_path=tokenizer.name_or_path,
        model_max_length=document_length,
        model_input_names=list(tokenizer.model_input_names),
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
        **special,
    )


def _check_prompts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a prompt's tokens are a prefix of the tokens of the prompt with any text, and end as text."""
    shown, name = tokenizer.convert_ids_to_tokens, tokenizer.name_or_path
    for prompt in PROMPTS.values():
        alone = tokenizer(prompt)["input_ids"]
        # sentence-transformers takes a special token at the prompt's end for a [SEP] and counts one token less.
        if alone[-1] in tokenizer.all_special_ids:
            raise ValueError(
                f"The tokenizer of {name!r} ends the prompt {prompt!r} with a special token, {shown(alone)}, and "
                "every vector would be wrong: use an encoder whose vocabulary has '[' and ']'."
            )
        for probe in (*_PROBES, tokenizer.mask_token or "a"):
            joined = tokenizer(prompt + probe)["input_ids"]
            if joined[: len(alone)] != alone:
                raise ValueError(
                    f"The tokenizer of {name!r} joins the prompt {prompt!r} with the text after it (alone it is "
                    f"{shown(alone)}, before {probe!r} {shown(joined)}), and every vector would be wrong. Byte-level "
                    "BPE and SentencePiece do this with the space: use an encoder with a WordPiece tokenizer, such as "
                    'BERT, MiniLM or MPNet, or encoding="own".'
                )


def scale_modules(dim: int, scale: float) -> list[Module]:
    r"""The modules after the pooling of a student whose scores are `scale * cosine`, of vectors `sqrt(scale)` long.

    The matrix is `sqrt(scale)` times the identity: no stock module holds a single number. Training moves that number
    alone, at the encoder's learning rate, or its own: `learning_rate_mapping={r"\.3\.linear\.weight": 1e-2}`.
    """
    if isinstance(scale, bool) or not 0.0 < scale < float("inf"):
        raise ValueError(
            f"scale={scale!r}: give a finite number greater than 0, such as 20.0, or None for vectors as pooled."
        )
    weight = torch.eye(dim) * math.sqrt(scale)
    return [Normalize(), Dense(dim, dim, bias=False, activation_function=nn.Identity(), init_weight=weight)]


def length_of(modules: Sequence[Any]) -> Tensor | None:
    """The weight that makes all vectors of a student (or of its modules) one length.

    Returns:
        `(dim, dim)`, exactly `s` times the identity; None where the last modules are no learned scale.
    """
    ends = route_of(modules, "query")[-2:]
    if [type(module) for module in ends] != [Normalize, Dense]:
        return None
    before, last = ends
    plain = not last.bias and not last.use_residual and isinstance(last.activation_function, nn.Identity)
    names = {before.module_input_name, before.module_output_name, last.module_input_name, last.module_output_name}
    weight = last.linear.weight
    scalar = weight.shape[0] == weight.shape[1] and torch.equal(weight, _diagonal(weight[0, 0], len(weight)))
    return weight if plain and scalar and names == {"sentence_embedding"} else None


def _diagonal(value: Tensor, size: int) -> Tensor:
    return torch.diag(value.detach().expand(size))


def _uniform(gradient: Tensor) -> Tensor:
    # The nearest multiple of the identity: every element of the diagonal then takes the same step of the optimizer.
    return _diagonal(gradient.diagonal().mean(), len(gradient))


def keep_scalar(student: Any) -> None:
    """Let training move a student's learned scale, where it has one, and nothing else of its matrix.

    An optimizer that treats equal elements equally (SGD, Adam, AdamW, Adafactor and most others) keeps it exact.
    """
    weight = length_of(getattr(student, "_orig_mod", student))
    if weight is not None and weight.requires_grad and _uniform not in (weight._backward_hooks or {}).values():
        weight.register_hook(_uniform)
