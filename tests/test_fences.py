"""Pages stay where they are until the last program that could read them is over; without fences they would not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import pytest
from fences import run

READS = {"cpu": 300, "gpu": 50}
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


def test_slots_are_freed_and_reused_under_programs_in_flight(device):
    with jax.default_device(device):
        wrong, deepest = run(device, rounds=200, reads=READS[device.platform])
    assert wrong == []
    assert deepest >= 3, "programs were over too soon to be in danger"


def test_the_hazard_is_real(device):
    """The same without fences, in a process of its own: it reads what is not its own, or does not survive."""
    script = Path(__file__).parent / "fences.py"
    command = [sys.executable, script, device.platform, "--unfenced", "--reads", str(READS[device.platform])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0, done.stdout
    failed = "saw another request's pages" in done.stdout or "CUDA_ERROR" in done.stderr or done.returncode < 0
    assert failed, done.stderr
