"""What a benchmark ran on: hardware and versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import jax
import numpy as np


def hardware() -> dict[str, str]:
    """CPU, memory and, where there is one, GPU, in words."""
    found = {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "jax device": jax.local_devices()[0].device_kind,
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
        found["gpu"] = "; ".join(line.strip() for line in lines) or "none"
    return found


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, JAX, this package, and of `packages`."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "numpy", "jax-vattention", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def label(machine: dict[str, str]) -> str:
    """A short name for file names, such as `h100-80gb-hbm3` or `amd-epyc-2c`."""
    if machine["jax device"].lower() != "cpu":
        return _slug(machine["jax device"].replace("NVIDIA", ""))
    return _slug(f"{machine['cpu']} {machine['cores']}c")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def read_bandwidth(num_bytes: int = 512 * 2**20, repeats: int = 7) -> float:
    """GB/s at which all cores together read memory: numpy dot products of one array, a thread for each core."""
    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(num_bytes // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        best = float("inf")
        for _ in range(repeats):
            start = perf_counter()
            # numpy's dot gives up the interpreter lock; a part is read once, as both operands.
            list(pool.map(lambda part: float(np.dot(part, part)), parts))
            best = min(best, perf_counter() - start)
    return num_bytes / best / 1e9


class OtherLoad:
    """How much of the machine other programs take, from construction on. A timing is worth what this is near zero."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float:
        """CPU time of all other programs, as a share of all cores' time; 0 where Linux' counters are missing."""
        busy, own, wall = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, (busy - own) / max(wall * (os.cpu_count() or 1), 1e-9))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: busy of all cores, of this process, on the clock."""
        own = sum(os.times()[:4])
        busy = own
        with contextlib.suppress(OSError):
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
            busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, own, perf_counter()
