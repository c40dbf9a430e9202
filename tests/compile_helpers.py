"""Compiling programs for GPUs that are not there, and reading what XLA made of them."""

import contextlib
import functools
import importlib.util
import math
import os
import re
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, SingleDeviceSharding

TARGETS = {"a100": "a100_sxm_80", "h100": "h100_sxm", "b200": "b200"}
"""Short names of the GPUs that `compile_for` knows, and their files in `gpu_targets`."""

COMPILER_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}
"""XLA takes a view for memory in use: one larger than the GPU makes this pass compute things twice."""

# What may name an array of the view's size: it passes a buffer on or looks at a part of it, and makes none.
_NO_NEW_BUFFER = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "opt-barrier",
    "optimization-barrier",
}
_ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "u16": 2, "s16": 2, "u8": 1, "s8": 1, "f8e4m3fn": 1}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+[0-9][a-z0-9]*)\[([0-9,]*)\]")


def cuda_plugin_installed() -> bool:
    """Whether jax can compile for CUDA here; no GPU is needed."""
    return any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13))


@functools.cache
def target_device(target: str):
    """A device to compile for, not to run on."""
    # Without a driver the plugin's own start-up check would fail; the compiler does not need one.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    text = (Path(__file__).parent / "gpu_targets" / f"{TARGETS[target]}.txtpb").read_text()
    [device] = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1").devices
    return device


def compile_for(target: str, fn, *abstract_args, compiler_options=COMPILER_OPTIONS, kind=None):
    """`fn` compiled for a GPU of `TARGETS`. Arguments are pytrees of `jax.ShapeDtypeStruct` (or of arrays).

    `kind` names another GPU of the same instructions and sizes, which programs are traced for.
    """
    return lower_for(target, fn, *abstract_args, kind=kind).compile(compiler_options=compiler_options)


def lower_for(target: str, fn, *abstract_args, kind=None):
    """`fn` as `compile_for` compiles it: with its kernels, which XLA has not seen yet."""
    sharding = SingleDeviceSharding(target_device(target))
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract_args)
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    with _abstract_gpu(kind or target_device(target).device_kind):
        return jitted.lower(*args)


def _abstract_gpu(kind: str):
    """Tells Pallas which GPU it lowers for; older versions of jax need no telling."""
    try:
        from jax.sharding import AbstractDevice

        described = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    except (ImportError, TypeError):
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=described))


def instructions(compiled):
    """`(name, result type, opcode, rest of the line)` of every instruction that has a buffer of its own.

    What is inside a fusion has none: its values are computed element by element, where they are used.
    """
    text = compiled.as_text()
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.\-]+)", text))
    inside_fusion = False
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            inside_fusion = match.group(1) in fused
        elif not inside_fusion and (match := _INSTRUCTION.match(line)):
            yield match.groups()


def assert_views_not_copied(compiled, spec) -> None:
    """No instruction makes an array as large as a view, or one with a slot's number of tokens."""
    shapes = {group.plane_shape for group in spec.kv_groups}
    view_bytes = min(math.prod(shape) for shape in shapes) * spec.dtype.itemsize
    offenders = []
    for name, result, opcode, _ in instructions(compiled):
        # The result of an asynchronous start names its operands; what it runs is in a computation of its own.
        asynchronous = opcode.endswith(("-start", "-done", "-update")) and opcode != "copy-start"
        if opcode in _NO_NEW_BUFFER or asynchronous:
            continue
        for item, dims in _ARRAY.findall(result):
            shape = [int(dim) for dim in dims.split(",") if dim]
            size = math.prod(shape) * _ITEM_BYTES.get(item, 8)
            if size >= view_bytes or any(tuple(shape[-len(view) + 1 :]) == view[1:] for view in shapes):
                offenders.append(f"{name} = {result} {opcode}")
    if offenders:
        raise AssertionError("a view is copied by:\n" + "\n".join(offenders))
    # A copy of a whole view shows in the temporary memory too, whatever the instruction is called.
    if compiled.memory_analysis().temp_size_in_bytes >= view_bytes:
        raise AssertionError(f"temporary memory is as large as a view ({view_bytes} bytes)")


def entry_dependencies(compiled) -> dict[str, tuple[str, set[str]]]:
    """Of the entry computation: instruction name -> (opcode, names of everything that it depends on)."""
    text = compiled.as_text()
    entry = text[text.index("\nENTRY ") :].split("\n}", 1)[0]
    found: dict[str, tuple[str, set[str]]] = {}
    for line in entry.splitlines():
        if match := _INSTRUCTION.match(line):
            name, _, opcode, rest = match.groups()
            operands = [operand for operand in re.findall(r"%([\w.\-]+)", rest) if operand in found]
            found[name] = (opcode, set(operands).union(*(found[operand][1] for operand in operands)))
    return found
