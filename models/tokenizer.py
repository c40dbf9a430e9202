"""Text to token ids and back, with chat templates; built from GGUF metadata or from a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import chat_template, gguf_vocabulary
from .errors import ModelError, require
from .safetensors_file import read_json

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>")
"""End a turn where the template uses them, also in files that name no other end than that of the text."""

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 16
"""A character is at most 4 tokens of one byte each; text that stays broken for longer is not going to be whole."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of the package `tokenizers`, with what a model says about its use."""

    backend: Any
    """`tokenizers.Tokenizer`."""
    bos_token: str | None
    eos_token: str | None
    eos_ids: frozenset[int]
    """Tokens that end a generation."""
    template: str | None
    """Chat template (Jinja), if the model has one."""
    special_ids: frozenset[int]
    """Tokens that `decode` leaves out."""

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From a GGUF's key-value pairs.

        Raises:
          ModelError: the vocabulary is missing or of a kind that is not supported.
        """
        backend = gguf_vocabulary.build(metadata)
        tokens = metadata["tokenizer.ggml.tokens"]

        def token(key: str) -> str | None:
            number = metadata.get(f"tokenizer.ggml.{key}_token_id")
            return tokens[number] if number is not None and 0 <= number < len(tokens) else None

        ends = [end for key in ("eos", "eot", "eom") if (end := token(key)) is not None]
        return cls._create(backend, token("bos"), token("eos"), ends, metadata.get("tokenizer.chat_template"))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From a folder with `tokenizer.json`, and the files beside it that say how it is used.

        Raises:
          ModelError, FileNotFoundError: a file is missing or damaged.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            backend = require("tokenizers").Tokenizer.from_file(str(path))
        except ModuleNotFoundError:
            raise
        # The package raises plain Exception.
        except Exception as error:
            raise ModelError(f"{path}: not a tokenizer that the package 'tokenizers' reads ({error})") from error
        settings = _optional_json(path.parent / "tokenizer_config.json")
        bos, eos = (_content(settings.get(key)) for key in ("bos_token", "eos_token"))
        ends = [] if eos is None else [eos]
        for name in ("generation_config.json", "config.json"):
            ids = _optional_json(path.parent / name).get("eos_token_id")
            numbers = ids if isinstance(ids, list) else [] if ids is None else [ids]
            ends += [token for number in numbers if (token := backend.id_to_token(number)) is not None]
        return cls._create(backend, bos, eos, ends, _folder_template(path.parent, settings))

    @classmethod
    def _create(
        cls, backend: Any, bos: str | None, eos: str | None, ends: Iterable[str], template: str | None
    ) -> Tokenizer:
        special = frozenset(number for number, token in backend.get_added_tokens_decoder().items() if token.special)
        eos_ids = {number for end in ends if (number := backend.token_to_id(end)) is not None}
        for end in _END_OF_TURN:
            number = backend.token_to_id(end)
            if number in special and template is not None and end in template:
                eos_ids.add(number)
        return cls(backend, bos, eos, frozenset(eos_ids), template, special)

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special`, between the tokens that the model expects around a text."""
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens. Bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode([int(number) for number in ids], skip_special_tokens=True)

    def stream(self) -> StreamDecoder:
        """A decoder for one text that arrives token by token."""
        return StreamDecoder(self)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """`messages` (`{"role": ..., "content": ...}`) in the model's chat template.

        Raises:
          ModelError: the model has no template, or it refuses the messages.
        """
        if self.template is None:
            raise ModelError("this model has no chat template: use encode() on a text of your own")
        return chat_template.render(
            self.template,
            messages,
            bos_token=self.bos_token or "",
            eos_token=self.eos_token or "",
            add_generation_prompt=add_generation_prompt,
        )

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of `chat_text`. The template writes the special tokens, so none are added."""
        return self.encode(self.chat_text(messages, add_generation_prompt=add_generation_prompt), add_special=False)


class StreamDecoder:
    """Turns tokens into text as they come: `"".join(pushed) + finish()` is `decode` of all of them.

    A token may end within a character; its text is held until the character is whole. Each push decodes only the
    tokens since the last whole text, and the one text before, which decides about a leading space.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # emitted, still needed
        self._held: list[int] = []  # not emitted

    def push(self, token_id: int) -> str:
        """The text that became whole with this token, often empty."""
        if token_id in self._tokenizer.special_ids:
            return ""
        self._held.append(int(token_id))
        text = self._held_text()
        if text.endswith(_REPLACEMENT) and len(self._held) < _MAX_HELD_TOKENS:
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """What is still held, with U+FFFD for a character that never became whole."""
        return self._emit(self._held_text())

    def _held_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._held)[len(before) :]

    def _emit(self, text: str) -> str:
        if text:
            self._context, self._held = self._held, []
        return text


def _optional_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _content(token: Any) -> str | None:
    """A token's text; older files wrap it in a dictionary."""
    return token.get("content") if isinstance(token, dict) else token


def _folder_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, or the template in the settings: a text, or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        return named.get("default")
    return template
