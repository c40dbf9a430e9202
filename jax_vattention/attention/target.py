"""Which GPU a program is traced for: a description of one that is not there, or the first that is."""

from __future__ import annotations

import re
from typing import Any

import jax

_NAMES = {"9.0": "H100|H200|GH200", "10.0": "B100|B200|GB200"}
"""GPUs by compute capability."""
REGISTERS_STAY = jax.__version_info__ >= (0, 12)
"""Whether warpgroups of a kernel cannot give each other registers: jax 0.12 compiles Mosaic GPU kernels by nvJitLink,
which ignores `setmaxnreg`. A product that has too few then waits for each of its instructions (ptxas: C7512)."""


def kind() -> str:
    """Its name, as JAX has it; empty if there is none."""
    device = _device()
    return "" if device is None else device.device_kind


def capability() -> str | None:
    """Its compute capability, or its name if that is not known; None if there is none."""
    device = _device()
    if device is None or hasattr(device, "compute_capability"):
        return getattr(device, "compute_capability", None)
    known = (number for number, names in _NAMES.items() if re.search(rf"\b({names})\b", device.device_kind))
    return next(known, device.device_kind)


def described() -> Any:
    """The `jax.sharding.AbstractDevice` that a program is traced for, of whatever platform; None if for none."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def _device() -> Any:
    device = described()
    if device is not None:
        return device
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        return None
