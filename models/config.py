"""The dimensions of a Llama model, read from GGUF metadata or from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jax_vattention.spec import DEFAULT_PAGE_BYTES, KVCacheSpec

from .errors import ModelError

_SUPPORTED = "supported is the Llama family (Hugging Face architecture LlamaForCausalLM, GGUF architecture llama)"
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A Llama model's dimensions.

    Args:
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the feed-forward layers.
      num_layers: transformer layers.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_dim: elements of one head; even, because RoPE turns pairs.
      max_position_embeddings: most tokens of one request.
      rope_theta: base of the RoPE frequencies.
      rms_norm_eps: added to the mean square in RMSNorm.
      tie_word_embeddings: the embedding is also the output head.
      rope_divisors: `head_dim // 2` numbers that divide the RoPE frequencies (Llama 3.1 scaling), or None.

    Raises:
      ModelError, TypeError: a value makes no sense.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_divisors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            object.__setattr__(self, name, _positive_int(name, getattr(self, name)))
        for name in ("rope_theta", "rms_norm_eps"):
            object.__setattr__(self, name, _positive_float(name, getattr(self, name)))
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every K and V head must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim: expected an even number (RoPE turns pairs), got {self.head_dim}")
        if self.rope_divisors is not None:
            self._check_divisors()

    def _check_divisors(self) -> None:
        divisors = tuple(_positive_float("rope_divisors", divisor) for divisor in self.rope_divisors or ())
        if len(divisors) != self.head_dim // 2:
            raise ModelError(
                f"rope_divisors: expected head_dim / 2 = {self.head_dim // 2} numbers, got {len(divisors)}"
            )
        object.__setattr__(self, "rope_divisors", divisors)

    @property
    def q_size(self) -> int:
        """Columns of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def inverse_frequencies(self) -> tuple[float, ...]:
        """RoPE's `head_dim // 2` angles per position, in radians."""
        divisors = self.rope_divisors or (1.0,) * (self.head_dim // 2)
        return tuple(
            frequency / divisor
            for frequency, divisor in zip(_frequencies(self.rope_theta, self.head_dim), divisors, strict=True)
        )

    def kv_cache_spec(
        self,
        *,
        num_slots: int,
        max_seq_len: int | None = None,
        dtype: Any = jnp.bfloat16,
        page_bytes: int = DEFAULT_PAGE_BYTES,
        **options: Any,
    ) -> KVCacheSpec:
        """The cache this model needs; `max_seq_len` is the model's maximum if not given.

        Other `options` go to `KVCacheSpec`: `large_page_bytes`, `layout`, `groups`.
        """
        return KVCacheSpec(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            num_slots=num_slots,
            max_seq_len=self.max_position_embeddings if max_seq_len is None else max_seq_len,
            dtype=dtype,
            page_bytes=page_bytes,
            **options,
        )

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> LlamaConfig:
        """From the contents of a `config.json`."""
        _check_hugging_face(values)
        hidden, heads = _get(values, "hidden_size"), _get(values, "num_attention_heads")
        head_dim = values.get("head_dim") or _default_head_dim(hidden, heads)
        theta, divisors = _hugging_face_rope(values, head_dim)
        return cls(
            vocab_size=_get(values, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_get(values, "intermediate_size"),
            num_layers=_get(values, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_position_embeddings=values.get("max_position_embeddings", 2048),
            rope_theta=theta,
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            rope_divisors=divisors,
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        tie_word_embeddings: bool,
        rope_divisors: tuple[float, ...] | None = None,
    ) -> LlamaConfig:
        """From GGUF metadata. What a GGUF keeps in tensors is given apart.

        Args:
          metadata: the file's key-value pairs.
          tie_word_embeddings: the file has no tensor `output.weight`.
          rope_divisors: the values of the tensor `rope_freqs.weight`, if there.
        """
        _check_gguf(metadata)
        hidden, heads = _get(metadata, "llama.embedding_length"), _get(metadata, "llama.attention.head_count")
        head_dim = metadata.get("llama.attention.key_length") or _default_head_dim(hidden, heads)
        _check_gguf_heads(metadata, head_dim)
        vocab_size = metadata.get("llama.vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ()))
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=_get(metadata, "llama.feed_forward_length"),
            num_layers=_get(metadata, "llama.block_count"),
            num_heads=heads,
            num_kv_heads=metadata.get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=_get(metadata, "llama.context_length"),
            rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
            rms_norm_eps=_get(metadata, "llama.attention.layer_norm_rms_epsilon"),
            tie_word_embeddings=tie_word_embeddings,
            rope_divisors=rope_divisors,
        )


def _positive_int(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected a positive integer, got {value!r}") from None
    if isinstance(value, bool) or number <= 0:
        raise ModelError(f"{name}: expected a positive integer, got {value!r}")
    return number


def _positive_float(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a positive number, got {value!r}") from None
    if not (math.isfinite(number) and number > 0):
        raise ModelError(f"{name}: expected a positive number, got {value!r}")
    return number


def _get(values: Mapping[str, Any], key: str) -> Any:
    if key not in values:
        raise ModelError(f"the model's configuration has no '{key}': it is not a complete Llama configuration")
    return values[key]


def _default_head_dim(hidden: Any, heads: Any) -> int:
    hidden, heads = _positive_int("hidden_size", hidden), _positive_int("num_heads", heads)
    if hidden % heads:
        raise ModelError(f"no head_dim is given, and hidden_size={hidden} is not a multiple of num_heads={heads}")
    return hidden // heads


def _frequencies(theta: float, head_dim: int) -> list[float]:
    return [theta ** (-2.0 * pair / head_dim) for pair in range(head_dim // 2)]


def _check_hugging_face(values: Mapping[str, Any]) -> None:
    architectures = values.get("architectures")
    if architectures is None and values.get("model_type") == "llama":
        architectures = ["LlamaForCausalLM"]
    if not isinstance(architectures, list) or "LlamaForCausalLM" not in architectures:
        found = architectures or values.get("model_type")
        raise ModelError(f"the model's architecture is {found!r}; {_SUPPORTED}")
    for flag in ("attention_bias", "mlp_bias"):
        if values.get(flag):
            raise ModelError(f"the model has {flag}=true: projections with a bias are not supported")
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"the model's hidden_act is {activation!r}: only 'silu' (SwiGLU) is supported")


def _hugging_face_rope(values: Mapping[str, Any], head_dim: int) -> tuple[float, tuple[float, ...] | None]:
    """The base and, for Llama 3.1 scaling, the divisors of the frequencies.

    Transformers 5 writes one dictionary `rope_parameters`, earlier versions `rope_theta` and `rope_scaling`.
    """
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ModelError(f"rope_parameters / rope_scaling: expected a dictionary, got {parameters!r}")
    theta = _positive_float("rope_theta", parameters.get("rope_theta", values.get("rope_theta", 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "llama3":
        return theta, _llama3_divisors(theta, _positive_int("head_dim", head_dim), parameters)
    raise ModelError(f"the model's RoPE scaling is of type {kind!r}: supported are 'default' and 'llama3'")


def _llama3_divisors(theta: float, head_dim: int, parameters: Mapping[str, Any]) -> tuple[float, ...]:
    """Llama 3.1's scaling: long waves are slowed by `factor`, short ones kept, those between interpolated."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, trained = (_positive_float(name, _get(parameters, name)) for name in names)
    if high <= low:
        raise ModelError(f"RoPE scaling: expected high_freq_factor > low_freq_factor, got {high} and {low}")
    divisors = []
    for frequency in _frequencies(theta, head_dim):
        turns = trained * frequency / (2 * math.pi)
        share_kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / ((1.0 - share_kept) / factor + share_kept))
    return tuple(divisors)


def _check_gguf(metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelError(f"the GGUF's general.architecture is {architecture!r}; {_SUPPORTED}")
    if metadata.get("llama.expert_count"):
        raise ModelError("the GGUF holds a mixture of experts (llama.expert_count > 0): only dense Llama is supported")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none" or metadata.get("llama.rope.scale_linear", 1.0) != 1.0:
        raise ModelError(
            f"the GGUF's llama.rope.scaling.type is {scaling!r}: supported are none and Llama 3.1's, "
            "which is the tensor rope_freqs.weight"
        )


def _check_gguf_heads(metadata: Mapping[str, Any], head_dim: Any) -> None:
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if metadata.get(key, head_dim) != head_dim:
            raise ModelError(
                f"the GGUF has {key}={metadata[key]}, but heads of {head_dim}: K, V and RoPE of one size are supported"
            )
    for key in ("llama.attention.head_count", "llama.attention.head_count_kv", "llama.feed_forward_length"):
        if isinstance(metadata.get(key), list):
            raise ModelError(f"the GGUF has a different {key} for each layer: only equal layers are supported")
