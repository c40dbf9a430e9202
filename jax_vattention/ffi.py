"""The custom calls: registered with XLA once, one typed function for each."""

from __future__ import annotations

import functools
from importlib import resources

import jax
import jax.numpy as jnp

try:
    from jax_vattention import _native
except ImportError as error:
    raise ImportError(
        "jax_vattention's native module is not here. In a clone, Python finds the source folder before an installed "
        "package: install with 'pip install -e .', or run from another folder"
    ) from error
from jax_vattention.errors import DriverError, DriverUnavailableError


@functools.cache
def _register() -> None:
    for name, platform, handler in _native.ffi_targets():
        jax.ffi.register_ffi_target(name, handler, platform=platform)


def append(
    k_view: jax.Array,
    v_view: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    layer: jax.Array,
    slots: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    mapped: jax.Array,
    order: jax.Array,
) -> jax.Array:
    """Writes k and v into the views in place and returns the next order token; `xla_ffi/append.h` has the operands.

    To XLA a view is an operand that nothing writes, so it is never copied. Two things keep reads and writes apart:
    the call has a side effect, and whoever reads the view takes the order token that this returns.
    """
    _register()
    call = jax.ffi.ffi_call(
        "jax_vattention.append",
        jax.ShapeDtypeStruct(order.shape, order.dtype),
        has_side_effect=True,
        input_output_aliases={9: 0},
        vmap_method="sequential",
    )
    return call(k_view, v_view, k, v, layer, slots, positions, mask, mapped, order)


def read_tile(
    k_view: jax.Array,
    v_view: jax.Array,
    *,
    layer: jax.Array,
    slot: jax.Array,
    start: jax.Array,
    first: jax.Array,
    last: jax.Array,
    tokens: int,
    order: jax.Array,
) -> jax.Array:
    """Copies `tokens` tokens of a slot from `start` on into `[2, tokens, num_kv_heads, head_dim]`; CPU only.

    Tokens before `first` and at or past `last` are not touched: they come out as zeros. A plain slice will not do on
    a CPU: XLA may convert all of a 2-byte float operand to float32 first, and move that out of a loop, ahead of the
    write.
    """
    _register()
    call = jax.ffi.ffi_call(
        "jax_vattention.read_tile",
        jax.ShapeDtypeStruct((2, tokens, *k_view.shape[-2:]), k_view.dtype),
        vmap_method="sequential",
    )
    return call(k_view, v_view, layer, slot, start, first, last, order)


def no_order() -> jax.Array:
    """A fresh order token: no write has been dropped."""
    return jnp.zeros(4, jnp.int32)


@functools.cache
def load_kernels(ordinal: int) -> None:
    """Compiles `append.cu` for a CUDA device and loads it, once a process. It takes under a second.

    Raises:
      DriverUnavailableError: cuda-python is not installed.
      DriverError: compiling or loading failed.
    """
    source = resources.files("jax_vattention").joinpath("append.cu").read_text()
    _native.load_append_kernel(ordinal, _compile(source, ordinal))


def _compile(source: str, ordinal: int) -> bytes:
    """Device code for the architecture of a device, through NVRTC."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise DriverUnavailableError(
            "cuda-python is not installed: pip install 'jax_vattention[cuda12]' or 'jax_vattention[cuda13]'"
        ) from error

    def check(call: str, result: tuple, state: str = "compiling append.cu"):
        code, *values = result
        if int(code) != 0:
            raise DriverError(f"{call} failed with {code.name}: {state}", call, int(code), code.name, state, False)
        return values[0] if len(values) == 1 else tuple(values)

    device = check("cuDeviceGet", driver.cuDeviceGet(ordinal))
    attribute = driver.CUdevice_attribute
    major, minor = (
        check("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(name, device))
        for name in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    program = check("nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(source.encode(), b"append.cu", 0, [], []))
    options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"--std=c++17"]
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(result[0]) != 0:
        log = b" " * check("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program))
        check("nvrtcGetProgramLog", nvrtc.nvrtcGetProgramLog(program, log))
        check("nvrtcCompileProgram", result, log.decode(errors="replace"))
    image = b" " * check("nvrtcGetCUBINSize", nvrtc.nvrtcGetCUBINSize(program))
    check("nvrtcGetCUBIN", nvrtc.nvrtcGetCUBIN(program, image))
    check("nvrtcDestroyProgram", nvrtc.nvrtcDestroyProgram(program))
    return image
