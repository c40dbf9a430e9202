"""`attention`: checks the arguments and picks an implementation."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_vattention.attention import target
from jax_vattention.attention.features import Features
from jax_vattention.batch import RaggedBatch
from jax_vattention.differentiation import not_differentiable

if TYPE_CHECKING:
    from jax_vattention.cache import KVCache, LayerView

_log = logging.getLogger(__package__)

_DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class _Implementation:
    """Where an implementation lives and the platforms that it can be lowered for; `None` stands for all.

    Its module has

        run(q, view, order, batch, features, *, scale) -> (out, order)

    with `view` a LayerView, `features` a Features, and lengths that have been cut to what is mapped. If there is
    something that it does not serve, it also has

        refusal(q, view, batch, features) -> str | None

    which says what, or None if it serves these arguments. It may look at their shapes, dtypes and static fields.
    """

    module: str
    platforms: tuple[str, ...] | None

    def load(self) -> ModuleType:
        """The module; imported when first asked for."""
        return importlib.import_module(f".{self.module}", __package__)

    def refusal(self, *operands: Any) -> str | None:
        """What of these arguments the implementation does not serve; None if it serves them."""
        try:
            refusal = getattr(self.load(), "refusal", None)
        except ImportError as error:  # Pallas' backends come and go
            return f"jax {jax.__version__} ({error})"
        return None if refusal is None else refusal(*operands)


_IMPLEMENTATIONS = {
    "mosaic": _Implementation("pallas_mosaic", ("cuda",)),
    "triton": _Implementation("pallas_triton", ("cuda",)),
    "cudnn": _Implementation("cudnn", ("cuda",)),
    "mosaic_blackwell": _Implementation("pallas_blackwell", ("cuda",)),
    "reference": _Implementation("reference", None),
}


def implementations() -> tuple[str, ...]:
    """Names that `attention(implementation=)` takes, in the order in which `None` tries them."""
    return tuple(_IMPLEMENTATIONS)


def attention(
    q: jax.Array,
    cache: KVCache,
    *,
    layer: int | jax.Array,
    batch: RaggedBatch,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    prefix_lens: jax.Array | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[jax.Array, KVCache]:
    """Causal attention of this step's queries over the cached K and V of their requests.

    K and V of this step's tokens must have been appended before. A query of position `p` sees keys `0..p`, or those
    of its layer's window. Nothing at or past a request's `kv_lens`, nothing that its slot has no memory for, and
    nothing at all for a request without queries is ever addressed. (Only `cudnn` reads more: all of the tile that holds
    a request's last key.)

    Args:
      q: `[tokens, num_q_heads, head_dim]`; query heads `h * group .. (h + 1) * group - 1` use KV head `h`.
      cache: what to read. Its order token makes the read happen after the append that returned it.
      layer: which layer's K and V; an int, or an int32 scalar if the cache is one array.
      batch: which tokens belong to which request.
      scale: factor of the scores; `head_dim ** -0.5` if not given.
      soft_cap: bound of the scores: once scaled they become `soft_cap * tanh(scores / soft_cap)`, as in Gemma 2
        (arXiv 2408.00118).
      sinks: float32 `[num_q_heads]`: each query's softmax has `exp(sink)` of its head as one more term of the
        denominator, which has no value, so the weights of the keys sum to less than 1, as in GPT-OSS (arXiv
        2508.10925; Xiao et al., arXiv 2309.17453). Neither scale nor soft_cap apply to it.
      prefix_lens: int32 `[num_requests]`: the first so many tokens of a request see each other in both directions,
        later ones are causal, as in a prefix LM (Raffel et al., arXiv 1910.10683) and PaliGemma (arXiv 2407.07726):
        a query of position `p` sees keys `0..max(p, prefix_len - 1)` of those below `kv_lens`. Append a prefix in
        one step: a query does not see what a later step appends. Not for layers with a window.
      implementation: a name, or names of which the first is used that serves these arguments and the platform that
        the program is lowered for; `None` tries all (`implementations()`). Which it was, and why not an earlier one,
        the logger `jax_vattention.attention` says at level INFO, once for arguments of a kind; see `picked`.

    Returns:
      The result, shape and dtype of `q` (0 in rows of padding tokens), and the cache with the order token that
      the next append has to take, so that it cannot overwrite what this read still needs.

    Raises:
      ValueError, TypeError: an argument does not fit the cache, or no implementation that was named serves it.
      NotDifferentiableError: a derivative is asked for.
    """
    operands = _checked(q, cache, layer, batch, soft_cap, sinks, prefix_lens)
    scale = operands.view.head_dim**-0.5 if scale is None else _checked_scale(scale)
    names = _serving(_checked_names(implementation), operands)
    if q.shape[0] == 0 or batch.num_requests == 0:
        return jnp.zeros_like(q), cache
    q, view, batch, features = operands
    q, view, features = not_differentiable((q, view, features))
    out, order = _dispatch(q, view, cache.order, batch, features, scale=scale, names=names)
    return out, cache.with_order(order)


def picked(
    q: jax.Array,
    cache: KVCache,
    *,
    layer: int | jax.Array,
    batch: RaggedBatch,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    prefix_lens: jax.Array | None = None,
    implementation: str | Sequence[str] | None = None,
) -> str:
    """The name of the implementation that `attention` takes for these arguments; nothing runs.

    It is the one for the device that a program would be lowered for here: that of `jax.default_device`, or the first.
    Arrays may be `jax.ShapeDtypeStruct`.

    Raises:
      ValueError, TypeError: as `attention`; or none that was named is for this platform.
    """
    names, device = _checked_names(implementation), _Device.current(None)
    choices = []

    def look(q, cache, batch, sinks, prefix_lens):
        operands = _checked(q, cache, layer, batch, soft_cap, sinks, prefix_lens)
        choices.append(_choice(names, _refusals(names, operands), device.platform))

    jax.eval_shape(look, q, cache, batch, sinks, prefix_lens)
    [(name, reasons)] = choices
    if name is None:
        raise ValueError(f"attention: {'; '.join(reasons)}: pass implementation=None, which takes one that does")
    return name


# A jit of its own: the platform is resolved when the program is lowered, also for eager calls, and the kernels
# are traced once per shape and not once per layer.
@functools.partial(jax.jit, static_argnames=("scale", "names"))
def _dispatch(q, view, order, batch, features, *, scale: float, names: tuple[str, ...]):
    default, per_platform = _branches(names)
    branches = {name: functools.partial(found.load().run, scale=scale) for name, found in per_platform.items()}
    otherwise = None if default is None else functools.partial(default.load().run, scale=scale)
    if otherwise is not None and not branches:
        return otherwise(q, view, order, batch, features)
    return lax.platform_dependent(q, view, order, batch, features, **branches, default=otherwise)


class _Operands(NamedTuple):
    """What `refusal` looks at, checked."""

    q: jax.Array
    view: LayerView
    batch: RaggedBatch
    features: Features

    def kind(self) -> str:
        """What `refusal` can tell apart, for a reader."""
        q, view, features = self.q, self.view, self.features
        used = [name for name in ("soft_cap", "sinks", "prefix_lens") if getattr(features, name) is not None]
        used += [] if view.window is None else [f"a window of {view.window}"]
        kv_dtype = "" if view.k.dtype == q.dtype else f" on {view.k.dtype.name}"
        return (
            f"{'decode' if self.batch.max_q_len == 1 else 'prefill'}, {jnp.dtype(q.dtype).name}{kv_dtype}, "
            f"{q.shape[1]} query and {view.num_kv_heads} KV heads of {view.head_dim}, "
            f"{view.layout}{''.join(f', {name}' for name in used)}"
        )


class _Device(NamedTuple):
    """What programs are traced for, as far as that is known then."""

    platform: str
    """As lowering names it: 'cuda', not 'gpu'."""
    kind: str

    @classmethod
    def current(cls, q: jax.Array | None) -> _Device:
        """That of `q`, if it is on one; else of a program compiled for a device that is not there; else the default."""
        described = target.described()
        if described is not None:
            return cls(getattr(described, "platform", None) or "cuda", described.device_kind)
        device = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
        if isinstance(device, str):
            device = jax.devices(device)[0]
        if isinstance(q, jax.Array) and not isinstance(q, jax.core.Tracer):
            [device, *_] = q.devices()
        cuda = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
        return cls("cuda" if cuda else device.platform, device.device_kind)


def _serving(names: tuple[str, ...], operands: _Operands) -> tuple[str, ...]:
    """Those of `names` that serve these arguments; which platform it is for turns out when a program is lowered."""
    refusals = _refusals(names, operands)
    serving = tuple(name for name in names if refusals[name] is None)
    if not serving:
        refused = "; ".join(f"{name!r} does not serve {refusal}" for name, refusal in refusals.items())
        raise ValueError(f"attention: {refused}: pass implementation=None, which takes one that does")
    if len(names) > 1 and _log.isEnabledFor(logging.INFO):
        device = _Device.current(operands.q)
        picked_name, reasons = _choice(names, refusals, device.platform)
        _say_once(f"{device.kind}: {operands.kind()}", picked_name, "; ".join(reasons))
    return serving


def _refusals(names: tuple[str, ...], operands: _Operands) -> dict[str, str | None]:
    return {name: _IMPLEMENTATIONS[name].refusal(*operands) for name in names}


def _choice(
    names: tuple[str, ...], refusals: dict[str, str | None], platform: str
) -> tuple[str | None, tuple[str, ...]]:
    """The first of `names` for a platform, if there is one, and why it was none before it."""
    reasons = []
    for name in names:
        platforms = _IMPLEMENTATIONS[name].platforms
        if platforms is not None and platform not in platforms:
            reasons.append(f"{name!r} runs on {', '.join(platforms)} only")
        elif (refusal := refusals[name]) is not None:
            reasons.append(f"{name!r} does not serve {refusal}")
        else:
            return name, tuple(reasons)
    return None, tuple(reasons)


@functools.cache
def _say_once(kind: str, name: str | None, reasons: str) -> None:
    _log.info("attention on %s: %s%s", kind, "none" if name is None else repr(name), f" ({reasons})" if reasons else "")


def _branches(names: tuple[str, ...]) -> tuple[_Implementation | None, dict[str, _Implementation]]:
    """The implementation for platforms not named, if any, and the one for each platform that is named."""
    per_platform: dict[str, _Implementation] = {}
    for name in names:
        found = _IMPLEMENTATIONS[name]
        if found.platforms is None:
            return found, per_platform
        for platform in found.platforms:
            per_platform.setdefault(platform, found)
    return None, per_platform


def _readable(view: LayerView, batch: RaggedBatch) -> RaggedBatch:
    """`batch` with lengths cut to what is mapped, 0 for slots that do not exist: no number makes a kernel fault."""
    exists = (batch.slots >= 0) & (batch.slots < view.mapped.shape[1])
    slots = jnp.where(exists, batch.slots, 0)
    kv_lens = jnp.clip(batch.kv_lens, 0, jnp.where(exists, view.mapped[1, slots], 0))
    return dataclasses.replace(batch, slots=slots, kv_lens=kv_lens)


def _checked_names(implementation: str | Sequence[str] | None) -> tuple[str, ...]:
    if implementation is None:
        return implementations()
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names:
        raise ValueError("attention: implementation is an empty sequence; name one or pass None")
    for name in names:
        if name not in _IMPLEMENTATIONS:
            raise ValueError(f"attention: expected an implementation of {', '.join(_IMPLEMENTATIONS)}, got {name!r}")
    return names


def _checked_scale(scale: float) -> float:
    if isinstance(scale, jax.core.Tracer):
        raise TypeError("attention: scale must be a Python number, not a traced value; multiply q by it instead")
    return float(scale)


def _checked(q, cache, layer, batch, soft_cap, sinks, prefix_lens) -> _Operands:
    """The operands of an implementation.

    Raises:
      ValueError, TypeError: they do not fit each other.
    """
    view = cache.layer_view(layer)
    _check_query(q, view)
    _check_batch(batch)
    features = Features.checked(soft_cap, sinks, prefix_lens, num_q_heads=q.shape[1], view=view, batch=batch)
    batch = _readable(view, batch)
    return _Operands(q, view, batch, features.bounded(batch))


def _check_query(q: jax.Array, view: LayerView) -> None:
    if q.ndim != 3:
        raise ValueError(f"attention: q must be [tokens, num_q_heads, head_dim], got shape {q.shape}")
    if q.shape[2] != view.head_dim:
        raise ValueError(f"attention: q has head_dim {q.shape[2]}, the cache has {view.head_dim}")
    if q.shape[1] == 0 or q.shape[1] % view.num_kv_heads:
        raise ValueError(
            f"attention: q has {q.shape[1]} heads, which is not a multiple of the cache's {view.num_kv_heads} KV heads"
        )
    if jnp.dtype(q.dtype).name not in _DTYPES:
        raise TypeError(f"attention: q must be one of {', '.join(_DTYPES)}, got {jnp.dtype(q.dtype).name}")


def _check_batch(batch: RaggedBatch) -> None:
    for name in ("slots", "q_starts", "q_lens", "kv_lens"):
        array = getattr(batch, name)
        if array.shape != (batch.num_requests,) or array.dtype != jnp.int32:
            raise ValueError(
                f"attention: batch.{name} must be int32[{batch.num_requests}], got {array.dtype}{list(array.shape)}"
            )
    if batch.max_q_len < 1:
        raise ValueError(f"attention: batch.max_q_len must be at least 1, got {batch.max_q_len}")
