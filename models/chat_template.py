"""Chat templates, rendered as Hugging Face transformers renders them: sandboxed Jinja and a few helpers."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ModelError, require


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The text of `messages` in `template`.

    Raises:
      ModelError: a message is not `{"role": text, "content": ...}`, or the template is broken or refuses them.
    """
    _check(messages)
    exceptions = require("jinja2").exceptions
    try:
        return _compile(template).render(messages=[dict(message) for message in messages], **variables)
    except exceptions.TemplateSyntaxError as error:
        raise ModelError(f"the model's chat template is not valid Jinja (line {error.lineno}): {error}") from error
    except exceptions.TemplateError as error:
        raise ModelError(f"the model's chat template refused the messages: {error}") from error


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, (str, Mapping)):
        raise ModelError('expected a list of messages {"role": ..., "content": ...}, got ' + type(messages).__name__)
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ModelError(f'expected messages of the form {{"role": "user", "content": "..."}}, got {message!r}')


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    sandbox = require("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise require("jinja2").exceptions.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
