"""The KV cache as a jitted program receives it."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_vattention import ffi
from jax_vattention.differentiation import not_differentiable
from jax_vattention.scales import Scales, quantize
from jax_vattention.spec import KVCacheSpec, Layout

GPU_COMPILER_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}
"""For `jax.jit(compiler_options=)` of every GPU program that takes a cache. XLA counts the view's virtual size as
device memory; where that is more than there is, its rematerialisation pass computes things twice to make room."""

_QUANTIZED_FROM = ("float32", "float16", "bfloat16", "float8_e4m3fn")
"""What `append` takes for a float8 cache."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerView:
    """K and V of one layer, as kernels take them: in place, whichever the layout.

    In `token_major` both are in `k`, `[num_slots, slot_tokens / 16, layers, 2, 16, num_kv_heads, head_dim]`, and `v`
    is None. In `layer_major` each is `[num_slots, slot_tokens, num_kv_heads, head_dim]`.
    """

    k: jax.Array
    v: jax.Array | None
    layer: jax.Array
    """int32 scalar: index of the layer in `k`; 0 in `layer_major`."""
    mapped: jax.Array
    """int32 `[2, num_slots]`: the first token of each slot with memory behind it, and one past the last."""
    window: int | None = dataclasses.field(metadata={"static": True})
    """A query of position `p` sees the keys `p - window + 1 .. p`; None: `0 .. p`."""
    scale_table: jax.Array | None = None
    """Of float8: float32 `[layers, 2, num_kv_heads]`, with `layers` and the index of the layer those of `k`."""

    @property
    def layout(self) -> Layout:
        """Of the cache that it is a view of."""
        return "token_major" if self.v is None else "layer_major"

    @property
    def scales(self) -> jax.Array | None:
        """float32 `[2, num_kv_heads]`: what K and V are to be multiplied with. None: they are not float8."""
        if self.scale_table is None:
            return None
        return lax.dynamic_index_in_dim(self.scale_table, self.layer, keepdims=False)

    @property
    def views(self) -> tuple[jax.Array, jax.Array]:
        """Where K is and where V is; the same array in `token_major`."""
        return self.k, self.k if self.v is None else self.v

    @property
    def slot_tokens(self) -> int:
        """Tokens that there is room for in a slot."""
        return self.k.shape[1] * (self.k.shape[4] if self.v is None else 1)

    @property
    def num_kv_heads(self) -> int:
        """K and V heads."""
        return self.k.shape[-2]

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.k.shape[-1]


Views = tuple[tuple[jax.Array, ...], ...]
"""For each group of layers its planes, as `KVGroup` describes them."""


class _Traced:
    """The views inside a program that is being traced: part of a cache's structure, not leaves of it."""

    def __init__(self, views: Views):
        # Weak, for the structure of an output outlives the trace.
        self._views = tuple(tuple(weakref.ref(plane) for plane in planes) for planes in views)
        self._key = tuple(id(plane) for planes in views for plane in planes)

    def get(self) -> Views | None:
        views = tuple(tuple(plane() for plane in planes) for planes in self._views)
        return None if any(plane is None for planes in views for plane in planes) else views  # type: ignore[return-value]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        # An id may be in use again once its view is gone.
        return isinstance(other, _Traced) and self._key == other._key and None not in (self.get(), other.get())

    def __hash__(self) -> int:
        return hash(self._key)


@jax.tree_util.register_pytree_with_keys_class
class KVCache:
    """Views of the whole cache, what of it is mapped, and the token that orders writes and reads.

    Pass it to a jitted program as an ordinary argument, never donated. Inside, `append` and `attention` each return
    the cache to go on with; it may be carried through `scan`, `while_loop` and `cond`. A program returns the last
    one, or its `order`, for `KVCacheManager.finish`.

    The views do not leave a program. An array that a program returns is a new array, so returning a view would
    copy all of it, and touch what is not mapped. Inside a program the views are therefore no leaves of this pytree: a
    cache that comes out has an order token and no views. The next program gets its cache from `KVCacheManager.step`.

    Args:
      views: for each group of layers its planes (`KVCacheSpec.kv_groups` has their shapes).
      mapped: for each group int32 `[2, num_slots]`: the first token of each slot with memory behind it, and one past
        the last.
      order: int32 `[4]`: the order token. It is a status too: (writes dropped, slot, position and end of the mapped
        tokens of the first of them).
      spec: dimensions.
      scales: what stored values are to be multiplied with, as `cache_scales` returns it; None unless it is float8.
    """

    def __init__(
        self,
        views: Views | None,
        mapped: tuple[jax.Array, ...],
        order: jax.Array,
        spec: KVCacheSpec,
        scales: Scales | None = None,
    ):
        self._views = views
        self.mapped = mapped
        self.order = order
        self.spec = spec
        self.scales = scales

    @property
    def views(self) -> Views:
        """The whole cache. Read it where tokens are mapped only, and never return it from a program.

        Raises:
          ValueError: this cache came out of a program.
        """
        if self._views is None:
            raise ValueError(
                "this cache came out of a program and has no view any more: pass it to KVCacheManager.finish(), and "
                "take the cache for the next program from KVCacheManager.step()"
            )
        return self._views

    @property
    def view(self) -> jax.Array:
        """The one array of a `token_major` cache without groups.

        Raises:
          ValueError: this cache came out of a program, or it has several arrays.
        """
        if self.views[0][0].shape != self.spec.view_shape:
            raise ValueError(f"expected a view {self.spec.view_shape}, got {self.views[0][0].shape}")
        return self.views[0][0]

    @property
    def mapped_lens(self) -> jax.Array:
        """int32 `[num_slots]`: how far each slot has memory, in all groups."""
        lens = self.mapped[0][1]
        for mapped in self.mapped[1:]:
            lens = jnp.minimum(lens, mapped[1])
        return lens

    def layer_view(self, layer: int | jax.Array) -> LayerView:
        """K and V of one layer, for a kernel. Its reads must take this cache's `order`; see `attention`.

        Args:
          layer: an int; or an int32 scalar, if the cache is one array.

        Raises:
          ValueError, TypeError: the layer is not one of the cache's, or is traced and the cache has several arrays.
        """
        spec = self.spec
        _check_integer("layer", layer)
        if (self.scales is None) == spec.quantized:
            raise ValueError(
                f"KVCache: expected {'scales' if spec.quantized else 'no scales'} for {spec.dtype.name}, got "
                f"{'none' if spec.quantized else 'some'}; pass scales=cache_scales(spec)"
            )
        if isinstance(layer, jax.core.Tracer):
            if spec.groups or spec.layout != "token_major":
                raise TypeError(
                    "layer: expected a Python int, for this cache has several arrays and a traced number cannot choose "
                    "one; unroll the layers, or use layout='token_major' without groups"
                )
            return LayerView(self.views[0][0], None, layer.astype(jnp.int32), self.mapped[0], None, self._scales(0, 0))
        number = int(layer)
        if not 0 <= number < spec.num_layers:
            raise ValueError(f"layer: expected 0 to {spec.num_layers - 1}, got {number}")
        g, index = spec.places[number]
        planes, window = self.views[g], spec.kv_groups[g].window
        if spec.layout == "token_major":
            at = jnp.asarray(index, jnp.int32)
            return LayerView(planes[0], None, at, self.mapped[g], window, self._scales(g, 0))
        k, v = planes[2 * index : 2 * index + 2]
        return LayerView(k, v, jnp.zeros((), jnp.int32), self.mapped[g], window, self._scales(g, index))

    def with_order(self, order: jax.Array) -> KVCache:
        """The same cache with the order token of a later read or write."""
        return KVCache(self._views, self.mapped, order, self.spec, self.scales)

    def __repr__(self) -> str:
        # Never the arrays themselves: printing a view would touch what is not mapped.
        planes = sum(group.planes for group in self.spec.kv_groups)
        shown = f"view_shape={self.spec.view_shape}" if planes == 1 else f"views={planes}"
        return f"KVCache({shown}, dtype={self.spec.dtype.name})"

    def tree_flatten_with_keys(self) -> tuple[tuple, tuple]:
        """Leaves: the views (outside of traced programs only), `mapped`, `order`, and `scales` of float8."""
        key = jax.tree_util.GetAttrKey
        leaves = ((key("mapped"), self.mapped), (key("order"), self.order), (key("scales"), self.scales))
        if self._views is not None and isinstance(self._views[0][0], jax.core.Tracer):
            return leaves, (self.spec, _Traced(self._views))
        return ((key("views"), self._views), *leaves), (self.spec, None)

    @classmethod
    def tree_unflatten(cls, structure: tuple, leaves: tuple) -> KVCache:
        """The inverse of `tree_flatten_with_keys`."""
        spec, traced = structure
        if traced is None:
            views, mapped, order, scales = leaves
            return cls(views, mapped, order, spec, scales)
        mapped, order, scales = leaves
        left_program = isinstance(order, jax.Array) and not isinstance(order, jax.core.Tracer)
        return cls(None if left_program else traced.get(), mapped, order, spec, scales)

    def append(
        self,
        k: jax.Array,
        v: jax.Array | None = None,
        *,
        layer: int | jax.Array,
        slots: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None = None,
    ) -> KVCache:
        """Writes the K and V of a ragged batch of tokens in place.

        A token whose position is not one of its slot's mapped tokens is dropped, and `KVCacheManager.finish` raises.
        No two tokens of one call may have the same slot and position.

        Args:
          k: `[tokens, num_kv_heads, head_dim]`; or, without `v`, K and V as `[tokens, 2, num_kv_heads, head_dim]`. Of
            the cache's dtype. A float8 cache takes float32, float16 and bfloat16 too, divides by the scale and rounds
            to the nearest float8; what is out of range becomes the largest one.
          v: `[tokens, num_kv_heads, head_dim]`, likewise.
          layer: which layer; an int, or an int32 scalar if the cache is one array.
          slots: int32 `[tokens]`.
          positions: int32 `[tokens]`: the token's position in its request.
          mask: bool `[tokens]`: False for padding, which is not written. None: all are written.

        Returns:
          The cache with the next order token.

        Raises:
          ValueError, TypeError: a shape, dtype or layer does not fit the cache.
          NotDifferentiableError: a derivative with respect to k, v or the cache is asked for.
        """
        at = self.layer_view(layer)
        self._check_kv(k, v, at)
        tokens = k.shape[0]
        _check("slots", slots, (tokens,), jnp.int32)
        _check("positions", positions, (tokens,), jnp.int32)
        if mask is None:
            mask = jnp.ones(tokens, jnp.bool_)
        _check("mask", mask, (tokens,), jnp.bool_)
        at, k, v = not_differentiable((at, k, v))
        if v is None:
            k = v = _stored(k, at, slice(None))
        else:
            k, v = _stored(k, at, 0), _stored(v, at, 1)
        order = ffi.append(
            *at.views,
            k,
            v,
            layer=at.layer,
            slots=slots,
            positions=positions,
            mask=mask,
            mapped=at.mapped,
            order=self.order,
        )
        return self.with_order(order)

    def _check_kv(self, k: jax.Array, v: jax.Array | None, at: LayerView) -> None:
        tokens = k.shape[0] if k.ndim else 0
        heads = (at.num_kv_heads, at.head_dim)
        named = (("k (with K and V, as v is None)", k),) if v is None else (("k", k), ("v", v))
        for name, array in named:
            shape = (tokens, 2, *heads) if v is None else (tokens, *heads)
            _check(name, array, shape, _wide_dtype(name, array) if self.spec.quantized else self.spec.dtype)

    def _scales(self, group: int, plane: int) -> jax.Array | None:
        return None if self.scales is None else self.scales[group][plane]


def _stored(x: jax.Array, at: LayerView, part: int | slice) -> jax.Array:
    """`x` as the cache stores it; `part` is that of the scales: 0 for K, 1 for V, all for both.

    Plain operations on values that a program has just computed: XLA makes them part of whatever computes those.
    """
    if at.scales is None or x.dtype == at.k.dtype:
        return x
    return quantize(x, at.scales[part, :, None])


def _wide_dtype(name: str, array: jax.Array) -> Any:
    if array.dtype.name not in _QUANTIZED_FROM:
        raise TypeError(
            f"{name}: expected one of {', '.join(_QUANTIZED_FROM)}, got {array.dtype}; convert it with "
            ".astype('float32')"
        )
    return array.dtype


def _check_integer(name: str, value: int | jax.Array) -> None:
    if np.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise TypeError(f"{name}: expected an int or an int32 scalar, got {value!r}")


def _check(name: str, array: jax.Array, shape: tuple[int, ...], dtype: Any) -> None:
    """Raises unless `array` has this shape and dtype."""
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    if array.dtype != jnp.dtype(dtype):
        expected = jnp.dtype(dtype).name
        raise TypeError(f"{name}: expected dtype {expected}, got {array.dtype}; convert it with .astype('{expected}')")
