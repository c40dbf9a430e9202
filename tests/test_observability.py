"""What a manager says of itself: metrics for a scraper, snapshots and their pictures, and what its page says."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jax_vattention import KVCacheManager, KVCacheSpec, cli
from jax_vattention.stats import CacheStats, SlotSnapshot, Snapshot
from tests.test_manager import conserved

DOCS = Path(__file__).parent.parent / "docs"
