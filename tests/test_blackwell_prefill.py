"""The Blackwell prefill kernel, in Pallas' interpreter; and compiled for a GPU that is not there."""

import prefill_cases
import pytest

from jax_vattention.attention import blackwell_prefill


@pytest.mark.parametrize(
    ("requests", "options"),
    [
        ([(256, 256)], {"blocks": 1, "kv_heads": 1}),
    ],
    ids=str,
)
def test_in_the_interpreter(requests, options):
    prefill_cases.check(blackwell_prefill, requests, **options)
