"""Programs compiled for GPUs on a machine that has none: the view is never copied and temporary memory is fixed."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from caches import abstract_cache
from compile_helpers import (
    TARGETS,
    assert_views_not_copied,
    compile_for,
    cuda_plugin_installed,
    entry_dependencies,
    instructions,
    lower_for,
)

from jax_vattention import KVCacheSpec, LayerGroup, RaggedBatch, attention
from jax_vattention.attention import decode_shape, mosaic_copy, mosaic_prefill, prefill_shape, tilings
from jax_vattention.attention.target import REGISTERS_STAY

pytestmark = [
    pytest.mark.compile_gpu,
    pytest.mark.skipif(not cuda_plugin_installed(), reason="jax's CUDA plugin is not installed"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]

REQUESTS = 16
Q_HEADS = 32


def int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def abstract_batch(max_q_len):
    rows = int32(REQUESTS)
    return RaggedBatch(slots=rows, q_starts=rows, q_lens=rows, kv_lens=rows, max_q_len=max_q_len)


def llama_spec(max_seq_len=131072, dtype=jnp.bfloat16, head_dim=128, kv_heads=8, layout="token_major"):
    return KVCacheSpec(32, kv_heads, head_dim, REQUESTS, max_seq_len, dtype, layout=layout)


def abstract_q(spec, max_q_len):
    tokens = REQUESTS if max_q_len == 1 else 1024
    return jax.ShapeDtypeStruct((tokens, Q_HEADS, spec.head_dim), spec.dtype)


def results_of(monkeypatch, owner, name):
    """What the function of this name returns from now on."""
    function, found = getattr(owner, name), []

    def remembered(*args, **options):
        found.append(function(*args, **options))
        return found[-1]

    monkeypatch.setattr(owner, name, remembered)
    return found


def straight(q, cache, layer, batch):
    out, cache = attention(q, cache, layer=layer, batch=batch)
    out, cache = attention(out, cache, layer=layer + 1, batch=batch)
    return out, cache.order


def conditional(q, cache, layer, batch):
    def read(q, cache):
        q, cache = attention(q, cache, layer=layer, batch=batch)
        return q, cache.order

    return jax.lax.cond(layer > 0, read, lambda q, cache: (q, cache.order), q, cache)


PROGRAMS = {"straight": straight, "cond": conditional}


def compiled(target, program, spec, max_q_len):
    args = (abstract_q(spec, max_q_len), abstract_cache(spec), int32(), abstract_batch(max_q_len))
    return compile_for(target, PROGRAMS[program], *args)


def gpu_kernels(each):
    """Kernels of attention, and not the small ones that share out and join its work."""
    calls = [rest for *_, opcode, rest in instructions(each) if opcode == "custom-call"]
    whats = ("decode_combine", "decode_schedule", "prefill_schedule", "prefill_order")
    small = tuple(f'name = "attention_{what}"' for what in whats)
    return [
        rest
        for rest in calls
        if 'custom_call_target="mosaic_gpu' in rest or ("triton" in rest and not any(name in rest for name in small))
    ]


def expected(target, max_q_len, spec):
    """Whose kernel a layer's attention is: one for batches of one kind and of both."""
    served = (64, 128) if max_q_len > 1 else (64, 96, 128, 192, 256)
    hopper = target == "h100" and spec.dtype == jnp.bfloat16 and spec.head_dim in served
    mosaic = hopper and jax.__version_info__ >= (0, 11)
    return "mosaic" if mosaic else "triton"


def hopper_kernels(max_q_len):
    """Of a layer: one for a batch of both kinds, if warpgroups can give each other registers."""
    return 2 if REGISTERS_STAY and max_q_len > 1 else 1


one_kernel_for_both = pytest.mark.skipif(REGISTERS_STAY, reason="two kernels with this version of jax")


def mosaic_kernels(each):
    return [rest for rest in gpu_kernels(each) if 'custom_call_target="mosaic_gpu' in rest]


# Loops are in `test_compile_programs`, with smaller sizes.
@pytest.mark.parametrize(("program", "max_q_len"), [("straight", 1), ("cond", 1), ("straight", 512)])
def test_view_is_not_copied(program, max_q_len):
    short, long = llama_spec(max_seq_len=8192), llama_spec(max_seq_len=131072)
    programs = [compiled("h100", program, spec, max_q_len) for spec in (short, long)]
    for spec, each in zip((short, long), programs, strict=True):
        assert_views_not_copied(each, spec)
    temporary = [each.memory_analysis().temp_size_in_bytes for each in programs]
    assert temporary[0] == temporary[1]


@pytest.mark.parametrize(
    ("target", "dtype", "head_dim"),
    [
        *((target, "bfloat16", head_dim) for target in TARGETS for head_dim in (64, 80, 96, 128, 256)),
        # The same kernels on all GPUs, of which these are the largest and one that is padded.
        *(("a100", "float32", head_dim) for head_dim in (64, 80, 96, 128, 256)),
        *((target, "float32", head_dim) for target in ("h100", "b200") for head_dim in (80, 256)),
    ],
)
@pytest.mark.parametrize("max_q_len", [1, 512], ids=["decode", "prefill"])
def test_kernels_fit_every_gpu(target, max_q_len, dtype, head_dim):
    spec = llama_spec(dtype=jnp.dtype(dtype), head_dim=head_dim)
    each = compiled(target, "straight", spec, max_q_len)
    assert_views_not_copied(each, spec)
    assert_chosen(each, target, max_q_len, spec)


def assert_chosen(each, target, max_q_len, spec):
    """For both layers of a program."""
    is_mosaic = expected(target, max_q_len, spec) == "mosaic"
    kernels = 2 * hopper_kernels(max_q_len) if is_mosaic else 2
    assert len(gpu_kernels(each)) == kernels, "the GPU implementation was not chosen"
    assert len(mosaic_kernels(each)) == (kernels if is_mosaic else 0)


SINKS = jax.ShapeDtypeStruct((Q_HEADS,), jnp.float32)
WITH_FEATURES = {
    "all": (KVCacheSpec(2, 8, 128, REQUESTS, 131072), {"sinks": SINKS, "prefix_lens": int32(REQUESTS)}),
    "cap, sinks and window": (
        KVCacheSpec(2, 8, 256, REQUESTS, 131072, jnp.float32, groups=(LayerGroup((0,)), LayerGroup((1,), window=4096))),
        {"sinks": SINKS},
    ),
}


def capped(q, cache, batch, arrays):
    for layer in (0, 1):
        q, cache = attention(q, cache, layer=layer, batch=batch, soft_cap=30.0, **arrays)
    return q, cache.order


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("max_q_len", [1, 512], ids=["decode", "prefill"])
@pytest.mark.parametrize("features", WITH_FEATURES)
def test_features_fit_every_gpu(target, max_q_len, features):
    spec, arrays = WITH_FEATURES[features]
    args = (abstract_q(spec, max_q_len), abstract_cache(spec), abstract_batch(max_q_len), arrays)
    each = compile_for(target, capped, *args)
    assert_views_not_copied(each, spec)
    assert_chosen(each, target, max_q_len, spec)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="not with this version of jax")
def test_blackwell_kernels_compile():
    """In a process of their own: Mosaic goes on compiling for the kind of GPU that it began with."""
    folder = Path(__file__).parent
    files = sorted(map(str, folder.glob("test_blackwell_*.py")))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "compile_b200", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, check=False)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 15


def test_blackwell_kernels_are_for_blackwell():
    def program(q, cache, batch):
        return attention(q, cache, layer=1, batch=batch, implementation="mosaic_blackwell")[0]

    spec = llama_spec()
    with pytest.raises(ValueError, match="'mosaic_blackwell' does not serve"):
        compile_for("h100", program, abstract_q(spec, 1), abstract_cache(spec), abstract_batch(1))


def appended_and_read(q, k, cache, batch):
    index = batch.token_index(q.shape[0])
    for layer in range(3):
        at = {"layer": layer, "slots": index.slots, "positions": index.positions, "mask": index.mask}
        cache = cache.append(k, k, **at)
        q, cache = attention(q, cache, layer=layer, batch=batch, implementation="cudnn")
    return q, cache.order


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "head_dim"), [(jnp.bfloat16, 128), (jnp.float16, 64)], ids=["bfloat16", "float16"])
def test_cudnn_reads_the_view_itself_between_two_appends(target, dtype, head_dim):
    spec = KVCacheSpec(3, 8, head_dim, REQUESTS, 131072, dtype, layout="layer_major")
    k = jax.ShapeDtypeStruct((REQUESTS, 8, head_dim), dtype)
    each = compile_for(target, appended_and_read, abstract_q(spec, 1), k, abstract_cache(spec), abstract_batch(1))
    assert_views_not_copied(each, spec)
    found = entry_dependencies(each)
    calls = [name for name, (opcode, _) in found.items() if opcode == "custom-call"]
    lines = {name: rest for name, _, opcode, rest in instructions(each) if opcode == "custom-call"}
    reads = [name for name in calls if 'custom_call_target="__cudnn$fmhaSoftmax"' in lines[name]]
    appends = [name for name in calls if 'custom_call_target="jax_vattention.append"' in lines[name]]
    assert (len(reads), len(appends)) == (3, 3)
    views = [name for name, (opcode, _) in found.items() if opcode == "parameter" and "views" in name]
    for layer, read in enumerate(reads):
        used = [view for view in views if f"%{view}," in lines[read]]
        assert len(used) == 2, "cuDNN does not read the parameters themselves"
        assert appends[layer] in found[read][1], "a read does not wait for the append before it"
        assert layer == 2 or read in found[appends[layer + 1]][1], "an append does not wait for the read before it"
    *_, result = found
    assert reads[-1] in found[result][1], "the order token that is returned does not depend on the read"


def quantized_and_read(x, weights, cache, batch):
    """Two layers, in which K and V come out of a product as in a model."""
    spec, tokens = cache.spec, x.shape[0]
    index = batch.token_index(tokens)
    for layer in (3, 4):
        k, v = ((x @ weight).reshape(tokens, spec.num_kv_heads, spec.head_dim) for weight in weights)
        cache = cache.append(k, v, layer=layer, slots=index.slots, positions=index.positions, mask=index.mask)
        q = x.reshape(tokens, Q_HEADS, spec.head_dim)
        out, cache = attention(q, cache, layer=layer, batch=batch, implementation=("triton", "reference"))
        x = out.reshape(x.shape)
    return x, cache.order


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="not with this version of jax")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "requests", "q_len", "cluster"),
    [(jnp.float16, 64, 1, 2048, 2), (jnp.bfloat16, 128, 4, 2048, 2), (jnp.bfloat16, 128, 4, 1024, 1)],
)
def test_prompts_on_hopper(dtype, head_dim, requests, q_len, cluster, monkeypatch):
    """Blocks share their reads if prompts are long."""
    found = results_of(monkeypatch, mosaic_prefill, "tiling_of")
    spec, rows = llama_spec(dtype=dtype, head_dim=head_dim), int32(requests)
    batch = RaggedBatch(slots=rows, q_starts=rows, q_lens=rows, kv_lens=rows, max_q_len=q_len)
    q = jax.ShapeDtypeStruct((requests * q_len, Q_HEADS, head_dim), dtype)
    each = compile_for("h100", straight, q, abstract_cache(spec), int32(), batch)
    assert_views_not_copied(each, spec)
    assert len(mosaic_kernels(each)) == 2
    assert all("attention_prefill" in rest for rest in mosaic_kernels(each))
    assert {tiling.cluster for tiling in found} == {cluster}


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="not with this version of jax")
@pytest.mark.parametrize("max_q_len", [1, pytest.param(512, marks=one_kernel_for_both)], ids=["decode", "prefill"])
def test_a_layer_on_hopper_is_one_launch(max_q_len):
    each = compiled("h100", "straight", llama_spec(), max_q_len)
    launched = [rest for *_, opcode, rest in instructions(each) if opcode in ("custom-call", "fusion", "copy")]
    layers = [rest for rest in launched if 'custom_call_target="mosaic_gpu' in rest]
    assert len(layers) == 2
    assert not any("attention_decode_combine" in rest for rest in launched)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="not with this version of jax")
@pytest.mark.parametrize(
    ("dtype", "max_q_len", "policies"),
    [
        (jnp.bfloat16, 1, set()),
        (jnp.float8_e4m3fn, 1, {mosaic_copy.READ_ONCE}),
        pytest.param(jnp.bfloat16, 512, {mosaic_copy.READ_AGAIN}, marks=one_kernel_for_both),
    ],
    ids=["decode", "float8", "mixed"],
)
def test_l2_is_told_what_is_read_again(dtype, max_q_len, policies, monkeypatch):
    given, give = set(), mosaic_copy._give

    def seen(copy, policy):
        given.add(policy)
        give(copy, policy)

    monkeypatch.setattr(mosaic_copy, "_give", seen)
    spec = llama_spec(max_seq_len=2048, dtype=dtype)  # as below, not a program of another test
    q = jax.ShapeDtypeStruct(abstract_q(spec, max_q_len).shape, jnp.bfloat16)
    lowered = lower_for("h100", straight, q, abstract_cache(spec), int32(), abstract_batch(max_q_len)).as_text()
    assert lowered.count("@mosaic_gpu") == 2
    assert given == policies


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="not with this version of jax")
def test_streams_count_in_no_table_of_kernels_that_may_run_at_the_same_time(monkeypatch):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_command_buffer_scheduling_mode=CONCURRENT"
    monkeypatch.setenv("XLA_FLAGS", flags)  # which XLA has read long ago
    # Not a program of another test: its kernels would be taken from there.
    spec = llama_spec(max_seq_len=4096)
    lowered = lower_for("h100", straight, abstract_q(spec, 1), abstract_cache(spec), int32(), abstract_batch(1))
    assert lowered.as_text().count('name = "attention_decode_combine"') == 2


@pytest.mark.parametrize(
    ("head_dim", "kv_heads"), [*((head_dim, 8) for head_dim in (64, 96, 128, 192, 256)), (128, 16)]
)
def test_float8_decode_on_hopper(head_dim, kv_heads):
    """Of more pairs than 128, here with 16 heads, eight heads of a token are read together."""
    spec = llama_spec(dtype=jnp.float8_e4m3fn, head_dim=head_dim, kv_heads=kv_heads)
    q = jax.ShapeDtypeStruct((REQUESTS, Q_HEADS, head_dim), jnp.bfloat16)
    each = compile_for("h100", straight, q, abstract_cache(spec), int32(), abstract_batch(1))
    assert_views_not_copied(each, spec)
    assert len(mosaic_kernels(each)) == (2 if jax.__version_info__ >= (0, 11) else 0)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "kv_heads", "max_q_len", "kind"),
    [
        (jnp.bfloat16, 192, 8, 4, None),
        (jnp.float16, 256, 8, 4, None),
        (jnp.float8_e4m3fn, 192, 8, 4, None),
        (jnp.float8_e4m3fn, 256, 1, 2, None),
        (jnp.float8_e4m3fn, 128, 8, 16, "NVIDIA H200"),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_most_shared_memory_of_a_decode_fits(dtype, head_dim, kv_heads, max_q_len, kind):
    """Long rows, and float8 keys that are widened because their queries leave no rows for a second number."""
    spec = llama_spec(dtype=dtype, head_dim=head_dim, kv_heads=kv_heads)
    q = jax.ShapeDtypeStruct((REQUESTS * max_q_len, Q_HEADS, head_dim), jnp.bfloat16 if spec.quantized else dtype)
    each = compile_for("h100", straight, q, abstract_cache(spec), int32(), abstract_batch(max_q_len), kind=kind)
    assert len(mosaic_kernels(each)) == (2 if jax.__version_info__ >= (0, 11) else 0)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="not with this version of jax")
@pytest.mark.parametrize("requests", [1, REQUESTS], ids=["prefill", "mixed"])
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(9, 3, 64), (14, 2, 64), (7, 1, 128)])
def test_prompts_of_heads_that_are_no_multiple_of_four(requests, q_heads, kv_heads, head_dim):
    """The schedule has a row for each of these KV heads."""
    spec = llama_spec(head_dim=head_dim, kv_heads=kv_heads)
    rows = int32(requests)
    batch = RaggedBatch(rows, rows, rows, rows, max_q_len=64)
    q = jax.ShapeDtypeStruct((256, q_heads, head_dim), jnp.bfloat16)
    each = compile_for("h100", straight, q, abstract_cache(spec), int32(), batch)
    kernels = 1 if requests == 1 or not REGISTERS_STAY else 2
    assert len(mosaic_kernels(each)) == 2 * kernels


TUNED = [row for row in tilings._rows() if row["kernel"] == "mosaic_decode" and "gpu" in row]
TUNED_MIXED = [row for row in tilings._rows() if row["kernel"].startswith("mosaic_mixed")]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="not with this version of jax")
@pytest.mark.parametrize("row", TUNED, ids=lambda row: "-".join(str(row.get(each)) for each in ("kv_dtype", "layout")))
def test_tuned_decode_fits(row, monkeypatch, capfd):
    check_tuned([row], row["gpu"], 1024 * (64 + TUNED.index(row)), monkeypatch, capfd)


@one_kernel_for_both
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="not with this version of jax")
@pytest.mark.parametrize("gpu", sorted({row.get("gpu") for row in TUNED_MIXED}, key=str))
def test_tuned_mixed_steps_fit(gpu, monkeypatch, capfd):
    rows = [row for row in TUNED_MIXED if row.get("gpu") == gpu]
    check_tuned(rows, gpu, 1024 * (100 if gpu is None else 101), monkeypatch, capfd)


def check_tuned(rows, gpu, length, monkeypatch, capfd):
    """Compiles a program with requests of this length, for what was compiled before is not reported again."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    shapes = {
        kernel: results_of(monkeypatch, shape.Shape, "of")
        for kernel, shape in (("mosaic_mixed", prefill_shape), ("mosaic_mixed_decode", decode_shape))
    }
    shapes["mosaic_decode"] = shapes["mosaic_mixed_decode"]
    row, is_mixed = rows[0], rows[0]["kernel"] != "mosaic_decode"
    layout = row.get("layout", "token_major")
    spec = llama_spec(length, jnp.dtype(row["kv_dtype"]), row["head_dim"], layout=layout)
    # Not room for as many queries of each request: that would be for prefill.
    tokens, max_q_len = (1024, 512) if is_mixed else (REQUESTS, 1)
    q = jax.ShapeDtypeStruct((tokens, Q_HEADS, spec.head_dim), jnp.bfloat16)

    def first_layers(q, cache, batch):
        return straight(q, cache, 0, batch)

    each = compile_for("h100", first_layers, q, abstract_cache(spec), abstract_batch(max_q_len), kind=gpu)
    assert_views_not_copied(each, spec)
    assert len(mosaic_kernels(each)) == 2
    assert_none_serialized("".join(capfd.readouterr()))
    for row in rows:
        found = shapes[row["kernel"]]
        assert found
        for shape in found:
            assert row["tiling"].items() <= dataclasses.asdict(shape.tiling).items()


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="not with this version of jax")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "max_q_len", "tokens"),
    [
        (jnp.bfloat16, 128, 1, REQUESTS),
        (jnp.float8_e4m3fn, 128, 1, REQUESTS),
        (jnp.bfloat16, 256, 4, 4 * REQUESTS),
        (jnp.float16, 128, 512, 1024),  # of both kinds
        (jnp.bfloat16, 128, 512, 512 * REQUESTS),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_no_product_is_serialized(dtype, head_dim, max_q_len, tokens, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    # What was compiled before is not reported again: sizes of no other test.
    spec = llama_spec(max_seq_len=12_288, dtype=dtype, head_dim=head_dim)
    q = jax.ShapeDtypeStruct((tokens, Q_HEADS, head_dim), jnp.bfloat16 if spec.quantized else dtype)
    each = compile_for("h100", straight, q, abstract_cache(spec), int32(), abstract_batch(max_q_len))
    assert len(mosaic_kernels(each)) == 2 * (hopper_kernels(max_q_len) if tokens == 1024 else 1)
    assert_none_serialized("".join(capfd.readouterr()))


def assert_none_serialized(report):
    """Products wait for each of their instructions where they have too few registers, or what they read is not seen."""
    assert "Used" in report, "ptxas reports nothing any more"
    assert not re.findall("wgmma.mma_async instructions are serialized.*", report)


@pytest.mark.parametrize(("target", "max_q_len"), [("a100", 1), ("h100", 512), ("b200", 1)])
def test_float8(target, max_q_len):
    """Triton converts float8 itself on newer GPUs only; K and V are quantized by what would copy them anyway."""
    spec = llama_spec(dtype=jnp.float8_e4m3fn)
    tokens = REQUESTS if max_q_len == 1 else 1024
    x = jax.ShapeDtypeStruct((tokens, Q_HEADS * spec.head_dim), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((x.shape[1], spec.num_kv_heads * spec.head_dim), jnp.bfloat16)
    each = compile_for(target, quantized_and_read, x, (weight, weight), abstract_cache(spec), abstract_batch(max_q_len))
    assert_views_not_copied(each, spec)
    assert len(gpu_kernels(each)) == 2, "the GPU implementation was not chosen"
    makes_float8 = [opcode for _, result, opcode, _ in instructions(each) if "f8e4m3fn" in result]
    launched = [opcode for opcode in makes_float8 if opcode in ("fusion", "copy", "convert", "custom-call")]
    assert set(launched) == {"fusion"}
    assert len(launched) <= 4, "K and V of a layer take one fusion each, or one together"
    scale_shapes = ("f32[2,8]", "f32[8]", "f32[1,2,8]", "f32[1,8]", "f32[32,2,8]")
    for name, result, opcode, _ in instructions(each):
        assert opcode != "fusion" or not result.startswith(scale_shapes), f"{name} does nothing but scales"
