"""The dimensions of a KV cache and the arithmetic that follows from them: bytes, pages, tokens."""

from __future__ import annotations

import dataclasses
import math
import operator
from functools import cached_property
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

KV_TAIL_TOKENS = 16
"""A kernel may read a slot's tokens up to its length rounded up to this many; the manager maps that far. Behind a
sliding window it may read from the window's first token rounded down to this many.

In `token_major` so many tokens of a layer lie together, a run. With runs of 8 tokens, the shortest piece that a GPU
copies into the shared memory layout of its tensor cores, decodes take longer (see `benchmarks/NOTES.md`). A page of
2 MiB holds 16 tokens of Llama-3-8B, and where pages hold multiples of 16 this maps nothing more.
"""

DEFAULT_PAGE_BYTES = 2 * 1024 * 1024
"""The granularity of the stock CUDA driver; the host backend takes it too, and smaller ones."""

Layout = Literal["token_major", "layer_major"]

_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers whose K and V have one shape and one lifetime.

    Args:
      layers: numbers of the layers.
      window: sliding window in tokens: a query of position `p` sees the keys `p - window + 1 .. p`, and pages wholly
        behind every later window are given back while the request lives. None: all keys up to `p`.
      num_kv_heads, head_dim: where they differ from those of the cache.
    """

    layers: tuple[int, ...]
    window: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(operator.index(layer) for layer in self.layers))
        for name in ("window", "num_kv_heads", "head_dim"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _positive(f"LayerGroup.{name}", getattr(self, name)))


@dataclasses.dataclass(frozen=True)
class KVGroup:
    """The memory of one group of layers: one or more planes, arrays in which a slot has a row.

    In `token_major` there is one plane, `[num_slots, slot_tokens / 16, layers, 2, 16, num_kv_heads, head_dim]`:
    all layers of a run of 16 tokens (`KV_TAIL_TOKENS`) are neighbours. Of each layer there is the K of the run, then
    its V: in pieces as long as that, memory is read at its full speed, and token by token it is not. In `layer_major`
    each layer has two planes, K and then V, `[num_slots, slot_tokens, num_kv_heads, head_dim]`.

    A slot grows in all planes alike, so pages are counted in one plane; `planes` times as many are mapped.
    """

    layers: tuple[int, ...]
    window: int | None
    num_kv_heads: int
    head_dim: int
    layout: Layout
    num_slots: int
    max_seq_len: int
    dtype: Any
    page_bytes: int

    @cached_property
    def planes(self) -> int:
        """Arrays of this group."""
        return 1 if self.layout == "token_major" else 2 * len(self.layers)

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token in one plane."""
        head_bytes = self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return head_bytes * 2 * len(self.layers) if self.layout == "token_major" else head_bytes

    @cached_property
    def slot_tokens(self) -> int:
        """Tokens that a plane has room for in a slot: `max_seq_len` rounded up to whole pages and runs.

        Planes of 1-byte elements of 2 to 4 GiB get more rows, until they are larger than that.
        """
        multiple = math.lcm(self.page_bytes // math.gcd(self.page_bytes, self.token_bytes), KV_TAIL_TOKENS)
        tokens = self.max_seq_len
        row_bytes = self.num_slots * self.token_bytes
        if self.dtype.itemsize == 1 and 2**31 < -(-tokens // multiple) * multiple * row_bytes <= 2**32:
            # Triton kernels count elements with an int32 in arrays of up to 4 GiB. More rows cost addresses only.
            tokens = 2**32 // row_bytes + 1
        return -(-tokens // multiple) * multiple

    @cached_property
    def slot_pages(self) -> int:
        """Pages of a slot, in one plane, that is mapped whole."""
        return self.slot_tokens * self.token_bytes // self.page_bytes

    @cached_property
    def plane_pages(self) -> int:
        """Pages from one plane to the next."""
        return self.num_slots * self.slot_pages

    @cached_property
    def plane_shape(self) -> tuple[int, ...]:
        """Shape of each plane."""
        if self.layout == "token_major":
            runs = (self.slot_tokens // KV_TAIL_TOKENS, len(self.layers), 2, KV_TAIL_TOKENS)
            return (self.num_slots, *runs, self.num_kv_heads, self.head_dim)
        return (self.num_slots, self.slot_tokens, self.num_kv_heads, self.head_dim)

    @cached_property
    def view_bytes(self) -> int:
        """Virtual bytes of all planes."""
        return self.planes * self.plane_pages * self.page_bytes

    def pages_for(self, tokens: int) -> int:
        """Pages of a plane that a slot of `tokens` tokens reaches, counted from its start."""
        runs = -(-min(tokens, self.slot_tokens) // KV_TAIL_TOKENS)
        return -(-runs * self._run_bytes // self.page_bytes)

    def tokens_in(self, pages: int) -> int:
        """Tokens in the whole runs of the first `pages` pages of a slot; at most `max_seq_len`."""
        return min(pages * self.page_bytes // self._run_bytes * KV_TAIL_TOKENS, self.max_seq_len)

    def pages_before(self, token: int) -> int:
        """Pages of a slot that hold nothing of what a kernel reads for `token` and what follows it: whole runs."""
        return token // KV_TAIL_TOKENS * self._run_bytes // self.page_bytes

    def first_token_in(self, page: int) -> int:
        """The first token of the first run that lies wholly at or behind the start of a page."""
        return -(-page * self.page_bytes // self._run_bytes) * KV_TAIL_TOKENS

    @property
    def _run_bytes(self) -> int:
        return KV_TAIL_TOKENS * self.token_bytes


@dataclasses.dataclass(frozen=True)
class KVCacheSpec:
    """What one KV cache holds. Arithmetic only: no memory is reserved or mapped here.

    Args:
      num_layers: layers that write K and V.
      num_kv_heads: K and V heads of a layer.
      head_dim: elements of one head.
      num_slots: requests that can be live at once; a slot is a row of every array of the cache.
      max_seq_len: most tokens of one request. Virtual memory costs nothing: choose the model's maximum.
      dtype: element type of K and V: float32, float16, bfloat16 or float8_e4m3fn, which has half the bytes of
        bfloat16 and a scale for each head (`KVCacheManager(kv_scales=)`).
      page_bytes: bytes of the smallest physical page, a multiple of the backend's granularity
        (CUDA: 2 MiB; host: 4 KiB).
      large_page_bytes: sizes of larger pages, ascending, each a multiple of the one before it; the first of
        `page_bytes`. Mapping costs per page and not per byte, so long requests are mapped faster with them.
      layout: `token_major`, one array in which all layers of 16 tokens are neighbours; or `layer_major`, two arrays
        for each layer, for kernels that cannot step over other layers.
      groups: layers that differ in shape or lifetime. Empty: all layers are one group. Otherwise each layer is in one.

    Raises:
      ValueError, TypeError: a size is not a positive integer, the dtype or the layout is unknown, or the groups do
        not cover the layers.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_slots: int
    max_seq_len: int
    dtype: Any = jnp.bfloat16
    page_bytes: int = DEFAULT_PAGE_BYTES
    large_page_bytes: tuple[int, ...] = ()
    layout: Layout = "token_major"
    groups: tuple[LayerGroup, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "num_slots", "max_seq_len", "page_bytes"):
            object.__setattr__(self, name, _positive(f"KVCacheSpec.{name}", getattr(self, name)))
        object.__setattr__(self, "dtype", _checked_dtype(self.dtype))
        object.__setattr__(self, "large_page_bytes", tuple(self.large_page_bytes))
        below = self.page_bytes
        for size in self.large_page_bytes:
            if _positive("KVCacheSpec.large_page_bytes", size) <= below or size % below:
                raise ValueError(
                    f"KVCacheSpec.large_page_bytes: expected ascending multiples, the first of page_bytes="
                    f"{self.page_bytes}, got {self.large_page_bytes}"
                )
            below = size
        if self.layout not in get_args(Layout):
            raise ValueError(f"KVCacheSpec.layout: expected one of {', '.join(get_args(Layout))}, got {self.layout!r}")
        object.__setattr__(self, "groups", tuple(self.groups))
        self._check_groups()
        for group in self.kv_groups:
            if group.slot_tokens > np.iinfo(np.int32).max:
                raise ValueError(
                    f"KVCacheSpec: max_seq_len={self.max_seq_len} rounded up to whole pages is {group.slot_tokens} "
                    "tokens; positions are int32: choose a smaller max_seq_len or page_bytes"
                )

    @cached_property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """The groups with everything filled in; one of all layers if none were given."""
        groups = self.groups or (LayerGroup(tuple(range(self.num_layers))),)
        return tuple(
            KVGroup(
                group.layers,
                group.window,
                group.num_kv_heads or self.num_kv_heads,
                group.head_dim or self.head_dim,
                self.layout,
                self.num_slots,
                self.max_seq_len,
                self.dtype,
                self.page_bytes,
            )
            for group in groups
        )

    @property
    def quantized(self) -> bool:
        """Whether K and V are stored as float8, with a scale for each head."""
        return self.dtype.itemsize == 1

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """For each layer: the number of its group, and its index in it."""
        found = {layer: (g, i) for g, group in enumerate(self.kv_groups) for i, layer in enumerate(group.layers)}
        return tuple(found[layer] for layer in range(self.num_layers))

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token: K and V of all layers."""
        return sum(group.token_bytes * group.planes for group in self.kv_groups)

    @cached_property
    def view_bytes(self) -> int:
        """Virtual bytes of the whole cache."""
        return sum(group.view_bytes for group in self.kv_groups)

    @cached_property
    def view_shape(self) -> tuple[int, ...]:
        """Shape of the one array of a `token_major` cache without groups.

        Raises:
          ValueError: the cache has several arrays.
        """
        if len(self.kv_groups) > 1 or self.kv_groups[0].planes > 1:
            raise ValueError("this cache has several arrays: see kv_groups, each with its planes and their shape")
        return self.kv_groups[0].plane_shape

    @cached_property
    def slot_pages(self) -> int:
        """Pages of a slot that is mapped whole, in all planes of all groups."""
        return sum(group.slot_pages * group.planes for group in self.kv_groups)

    @cached_property
    def slot_bytes(self) -> int:
        """Physical bytes of a slot that is mapped whole."""
        return self.slot_pages * self.page_bytes

    @property
    def tokens_per_page(self) -> float:
        """Tokens that one page of the first group holds; not a whole number where a token straddles two pages."""
        return self.page_bytes / self.kv_groups[0].token_bytes

    def pages_for(self, tokens: int) -> int:
        """Pages that a slot of `tokens` tokens needs in all planes of all groups, if no window gives any back."""
        return sum(group.pages_for(tokens) * group.planes for group in self.kv_groups)

    def tokens_in(self, pages: int) -> int:
        """Most tokens that a slot can hold in `pages` pages; at most `max_seq_len`."""
        low, high = 0, self.max_seq_len
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.pages_for(middle) <= pages else (low, middle - 1)
        return low

    def _check_groups(self) -> None:
        for group in self.groups:
            if not isinstance(group, LayerGroup):
                raise TypeError(f"KVCacheSpec.groups: expected LayerGroup, got {group!r}")
        named = sorted(layer for group in self.groups for layer in group.layers)
        if self.groups and (named != list(range(self.num_layers)) or not all(group.layers for group in self.groups)):
            raise ValueError(
                f"KVCacheSpec.groups: expected each of the layers 0 to {self.num_layers - 1} in one group, got {named}"
            )


def _positive(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected a positive integer, got {value!r}") from None
    if isinstance(value, bool) or size <= 0:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return size


def _checked_dtype(value: Any) -> Any:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise TypeError(f"KVCacheSpec.dtype: expected one of {', '.join(_DTYPES)}, got {value!r}") from None
    if dtype.name not in _DTYPES:
        raise ValueError(f"KVCacheSpec.dtype: expected one of {', '.join(_DTYPES)}, got {dtype.name}")
    return dtype
