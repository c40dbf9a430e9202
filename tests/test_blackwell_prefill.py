"""The Blackwell prefill kernel, in Pallas' interpreter; and compiled for a GPU that is not there."""

import prefill_cases
import pytest

from jax_vattention.attention import blackwell_prefill


@pytest.mark.parametrize(
    ("requests", "options"),
    [
        ([(200, 200)], {"blocks": 1, "kv_heads": 1}),
        ([(5, 5), (0, 0), (150, 300), (1, 90)], {"group": 1}),
        ([(70, 170), (64, 64)], {"layout": "layer_major", "kv_heads": 1}),
        ([(130, 259)], {"head_dim": 128, "dtype": "float16", "block_k": 128, "group": 1}),
        ([(40, 300), (30, 33)], {"window": 50, "group": 1}),
        ([(40, 140), (70, 70), (30, 90)], {"prefix_lens": [100, 200, 85], "group": 1}),
        ([(40, 140)], {"soft_cap": 2.0, "sinks": True, "kv_heads": 1}),
        ([(0, 0), (0, 0)], {"kv_heads": 1}),
        # Scores that differ so much that results are scaled down, and many buffers.
        ([(150, 300)], {"scale": -2.0, "group": 3, "kv_heads": 1, "q_stages": 2, "stages": 3}),
    ],
    ids=str,
)
def test_in_the_interpreter(requests, options):
    prefill_cases.check(blackwell_prefill, requests, **options)
