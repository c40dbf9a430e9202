"""The model as `transformers` runs it, with the weights that this package runs."""

from __future__ import annotations

import dataclasses
import importlib
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np

PACKAGES = ("torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Run:
    """One generation."""

    prefill_seconds: float
    """Prompt to first token."""
    decode_seconds: float
    """First token to last."""
    tokens: np.ndarray
    """`[batch, new_tokens]`."""


def require(module: str) -> ModuleType:
    """Imports a package that only benchmarks use; without it, says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ModuleNotFoundError(
            f"this benchmark needs the package '{module}', which is not installed: pip install {' '.join(PACKAGES)}",
            name=error.name,
        ) from error


class Transformers:
    """`LlamaForCausalLM` on all cores in float32, greedy, never ended by an end-of-sequence token.

    Args:
      model: this package's model; its weights are taken over bit for bit.
      threads: of torch, where a method is not told another number.
    """

    def __init__(self, model: Any, threads: int):
        self._torch = require("torch")
        self._transformers = require("transformers")
        self.threads = threads
        self.model = self._build(model)

    @property
    def attention(self) -> str:
        """The implementation of attention that transformers chose."""
        return self.model.config._attn_implementation

    def loop(self, prompts: np.ndarray, new_tokens: int, threads: int | None = None) -> Run:
        """A bare loop around the model and its `DynamicCache`: no logits processors, no stopping criteria."""
        torch = self._torch
        torch.set_num_threads(threads or self.threads)
        with torch.inference_mode():
            start = perf_counter()
            cache = self._transformers.DynamicCache(config=self.model.config)
            step = self._ids(prompts)
            tokens = []
            for _ in range(new_tokens):
                logits = self.model(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                step = logits[:, -1].argmax(-1, keepdim=True)
                if not tokens:
                    first = perf_counter()
                tokens.append(step)
            end = perf_counter()
            return Run(first - start, end - first, torch.cat(tokens, 1).numpy())

    def generate(self, prompts: np.ndarray, new_tokens: int) -> Run:
        """`model.generate` as users call it, with its default cache."""
        return self._generate(prompts, new_tokens)

    def generate_static(self, prompts: np.ndarray, new_tokens: int) -> Run:
        """`model.generate` with `cache_implementation="static"`."""
        return self._generate(prompts, new_tokens, cache_implementation="static")

    def _generate(self, prompts: np.ndarray, new_tokens: int, **options: Any) -> Run:
        """Decode is what more than one token takes longer than one token."""
        self._torch.set_num_threads(self.threads)
        ids = self._ids(prompts)

        def run(count: int) -> tuple[float, Any]:
            start = perf_counter()
            out = self.model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                **options,
            )
            return perf_counter() - start, out

        one, out = run(1)
        total = one
        if new_tokens > 1:
            total, out = run(new_tokens)
        return Run(one, total - one, out[:, ids.shape[1] :].numpy())

    def _ids(self, prompts: np.ndarray) -> Any:
        return self._torch.from_numpy(np.asarray(prompts, np.int64))

    def _build(self, model: Any) -> Any:
        config = model.config
        other = self._transformers.LlamaForCausalLM(
            self._transformers.LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                rms_norm_eps=config.rms_norm_eps,
                tie_word_embeddings=config.tie_word_embeddings,
                # Every run must have its full length: nothing ends it.
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        )
        weights = {name: self._torch.from_numpy(array) for name, array in _weights(model).items()}
        other.load_state_dict(weights, strict=True)
        return other.eval()


def _weights(model: Any) -> dict[str, np.ndarray]:
    """This package's weights under transformers' names, matrices as `[out, in]`."""

    def matrix(columns: Any) -> np.ndarray:
        return np.array(np.asarray(columns).T, np.float32, order="C")

    def vector(values: Any) -> np.ndarray:
        return np.array(values, np.float32)

    config = model.config
    head = matrix(model.head[...])
    weights = {
        "lm_head.weight": head,
        "model.embed_tokens.weight": head if config.tie_word_embeddings else vector(model.embedding[...]),
        "model.norm.weight": vector(model.norm.scale[...]),
    }
    for number, layer in enumerate(model.layers):
        qkv = np.asarray(layer.qkv[...])
        q, k, v = np.split(qkv, [config.q_size, config.q_size + config.kv_size], axis=1)
        gate, up = np.split(np.asarray(layer.gate_up[...]), 2, axis=1)
        matrices = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.out[...],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down[...],
        }
        prefix = f"model.layers.{number}"
        weights |= {f"{prefix}.{name}.weight": matrix(value) for name, value in matrices.items()}
        weights[f"{prefix}.input_layernorm.weight"] = vector(layer.attention_norm.scale[...])
        weights[f"{prefix}.post_attention_layernorm.weight"] = vector(layer.mlp_norm.scale[...])
    return weights
