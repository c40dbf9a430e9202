"""What can go wrong with a model's files, and the packages that reading them needs."""

from __future__ import annotations

import importlib
from types import ModuleType


class ModelError(ValueError):
    """A checkpoint or a tokenizer that cannot be used: the message says what was expected, found, and what to do."""


def require(module: str) -> ModuleType:
    """Imports an optional package; without it, names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"loading checkpoints and tokenizers needs the package '{module.split('.')[0]}', which is not installed: "
            "pip install 'jax_vattention[demo]'",
            name=error.name,
        ) from error
