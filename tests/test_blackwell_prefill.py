"""The Blackwell prefill kernel, in Pallas' interpreter; and compiled for a GPU that is not there."""

import jax
import jax.numpy as jnp
import prefill_cases
import pytest
from caches import abstract_cache
from compile_helpers import assert_views_not_copied, compile_for, cuda_plugin_installed

from jax_vattention import KVCacheSpec, LayerGroup, RaggedBatch
from jax_vattention.attention import blackwell_prefill
from jax_vattention.attention.features import Features

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


@pytest.mark.parametrize(
    ("requests", "options"),
    [
        ([(200, 200)], {"blocks": 1, "kv_heads": 1}),
        ([(5, 5), (0, 0), (150, 300), (1, 90)], {"group": 1}),
        ([(70, 170), (64, 64)], {"layout": "layer_major", "kv_heads": 1}),
        ([(130, 259)], {"head_dim": 128, "dtype": "float16", "block_k": 128, "group": 1}),
        ([(40, 300), (30, 33)], {"window": 50, "group": 1}),
        ([(40, 140), (70, 70), (30, 90)], {"prefix_lens": [100, 200, 85], "group": 1}),
        # One block has nothing to do.
        ([(40, 140)], {"soft_cap": 2.0, "sinks": True, "kv_heads": 1, "group": 1}),
        # Scores that differ so much that results are scaled down, and many buffers.
        ([(150, 300)], {"scale": -2.0, "kv_heads": 1, "q_stages": 2, "stages": 3}),
        ([(5, 5), (270, 300)], {"blocks": 1, "l2_bytes": 1}),
    ],
    ids=str,
)
def test_in_the_interpreter(requests, options):
    prefill_cases.check(blackwell_prefill, requests, **options)


REQUESTS, Q_HEADS = 4, 32


def compiled(*, head_dim=128, dtype=jnp.bfloat16, layout="token_major", window=None, features=(), scale=0.1):
    """A program of one layer, for a B200, and what it was compiled for."""
    groups = () if window is None else (LayerGroup((0,)), LayerGroup((1,), window=window))
    spec = KVCacheSpec(2, 8, head_dim, REQUESTS, 8192, dtype, layout=layout, groups=groups)
    rows = jax.ShapeDtypeStruct((REQUESTS,), jnp.int32)
    batch = RaggedBatch(rows, rows, rows, rows, max_q_len=512)
    q = jax.ShapeDtypeStruct((1024, Q_HEADS, head_dim), dtype)
    arrays = {"sinks": jax.ShapeDtypeStruct((Q_HEADS,), jnp.float32), "prefix_lens": rows}
    given = {name: arrays[name] for name in features if name in arrays}
    soft_cap = 30.0 if "soft_cap" in features else None

    def program(q, cache, batch, given):
        view = cache.layer_view(1)
        assert blackwell_prefill.refusal(q, view, batch, Features(soft_cap, **given)) is None
        return blackwell_prefill.run(q, view, cache.order, batch, Features(soft_cap, **given), scale=scale)

    return compile_for("b200", program, q, abstract_cache(spec), batch, given), spec


VARIANTS = {
    "head_dim 64": {"head_dim": 64},
    "head_dim 128": {},
    "head_dim 64, layer_major": {"head_dim": 64, "layout": "layer_major"},
    "head_dim 128, layer_major, negative scale": {"layout": "layer_major", "dtype": jnp.float16, "scale": -0.1},
    "window, cap and sinks": {"window": 500, "features": ("soft_cap", "sinks")},
    "all but a window": {"head_dim": 64, "features": ("soft_cap", "sinks", "prefix_lens")},
}


@pytest.mark.compile_b200
@pytest.mark.skipif(not cuda_plugin_installed(), reason="jax's CUDA plugin is not installed")
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="not with this version of jax")
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_for_a_b200(variant, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    program, spec = compiled(**VARIANTS[variant])
    assert_views_not_copied(program, spec)
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 1
    ptx = capfd.readouterr().out
    for instruction in ("tcgen05.mma.cta_group::1.kind::f16", "tcgen05.ld.sync", "tcgen05.st.sync", "cp.async.bulk"):
        assert instruction in ptx
