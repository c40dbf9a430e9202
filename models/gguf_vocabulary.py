"""A tokenizer of the package `tokenizers` from the vocabulary in a GGUF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ModelError, require

_CONTROL, _USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type` for tokens that are matched in the text before anything else."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_NAMES = ("default", "gpt-2", "gpt2")
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_SPACE = "\u2581"


def build(metadata: Mapping[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` that encodes as the model's own does.

    Args:
      metadata: the GGUF's key-value pairs.

    Raises:
      ModelError: no vocabulary, or one of a kind that is not supported.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelError(
            "the GGUF has no vocabulary (tokenizer.ggml.tokens): convert the model again, with its tokenizer"
        )
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens)
    elif kind == "llama":
        backend = _sentence_piece(metadata, tokens)
    else:
        raise ModelError(
            f"the GGUF's tokenizer.ggml.model is {kind!r}: supported are 'gpt2' (byte-level BPE) and 'llama'"
        )
    _add_tokens(backend, metadata, tokens)
    _add_begin_and_end(backend, metadata, tokens, begin_by_default=kind == "llama")
    return backend


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Any:
    """Byte-level BPE: GPT-2's and its descendants'."""
    tokenizers = require("tokenizers")
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise ModelError("the GGUF has no merges (tokenizer.ggml.merges): convert the model again, with its tokenizer")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    model = tokenizers.models.BPE(
        vocab=_vocabulary(tokens),
        merges=[tuple(merge.split(" ", 1)) for merge in merges],
        ignore_merges=pre in _LLAMA3_NAMES,
    )
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _pre_tokenizer(name: str) -> Any:
    """How text is cut before merging, for a value of `tokenizer.ggml.pre`."""
    pre = require("tokenizers").pre_tokenizers
    if name in _GPT2_NAMES:
        return pre.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        digits = pre.Digits(individual_digits=True)
        return pre.Sequence([digits, pre.ByteLevel(add_prefix_space=False, use_regex=True)])
    if name in _LLAMA3_NAMES:
        split = pre.Split(require("tokenizers").Regex(_LLAMA3_SPLIT), behavior="isolated")
        return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    supported = ", ".join((*_GPT2_NAMES, "smollm", *_LLAMA3_NAMES))
    raise ModelError(f"the GGUF's tokenizer.ggml.pre is {name!r}: supported are {supported}")


def _sentence_piece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Any:
    """SentencePiece BPE (Llama 1 and 2): merges follow from the scores, unknown characters become bytes."""
    tokenizers = require("tokenizers")
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ModelError("the GGUF needs one score for each token (tokenizer.ggml.scores): convert the model again")
    vocabulary = _vocabulary(tokens)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = tokenizers.models.BPE(
        vocab=vocabulary,
        merges=_merges(vocabulary, dict(zip(tokens, scores, strict=True))),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    replace = tokenizers.normalizers.Replace(" ", _SPACE)
    decoders = [
        tokenizers.decoders.Replace(_SPACE, " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend(_SPACE), replace])
        decoders.append(tokenizers.decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = tokenizers.decoders.Sequence(decoders)
    return backend


def _merges(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the best score of the result first."""
    ranked = []
    for token, number in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[token], number, vocabulary[left], vocabulary[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _add_tokens(backend: Any, metadata: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """Control tokens are special (left out when decoding); those that a user defined are text."""
    added = require("tokenizers").AddedToken
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    special = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    backend.add_special_tokens([added(token, normalized=False, special=True) for token in special])
    plain = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED]
    backend.add_tokens([added(token, normalized=False, special=False) for token in plain])


def _add_begin_and_end(
    backend: Any, metadata: Mapping[str, Any], tokens: Sequence[str], *, begin_by_default: bool
) -> None:
    """What `encode(..., add_special=True)` puts around a text."""
    begin_by_default = begin_by_default or metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    before = _token_if(metadata, tokens, "bos", begin_by_default)
    after = _token_if(metadata, tokens, "eos", False)
    if not before and not after:
        return
    processors = require("tokenizers").processors
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
    )


def _token_if(metadata: Mapping[str, Any], tokens: Sequence[str], key: str, default: bool) -> list[str]:
    number = metadata.get(f"tokenizer.ggml.{key}_token_id")
    wanted = metadata.get(f"tokenizer.ggml.add_{key}_token", default)
    return [tokens[number]] if wanted and number is not None else []
