"""What a caller asks for, what it gets, and the state of a request in between."""

from __future__ import annotations

import dataclasses
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it."""

    prompt_ids: tuple[int, ...]
    max_tokens: int = 128
    """Most tokens to generate."""
    temperature: float = 0.0
    """0 takes the most likely token; above that, tokens are drawn."""
    seed: int = 0
    """Of the draws. They depend on it and on the position alone, not on what else runs."""

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("Request.prompt_ids: expected at least one token, got none")
        if self.max_tokens <= 0:
            raise ValueError(f"Request.max_tokens: expected a positive number, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"Request.temperature: expected 0 or more, got {self.temperature}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"Request.seed: expected 0 to 2**32 - 1, got {self.seed}")


@dataclasses.dataclass(frozen=True)
class Output:
    """New tokens of one request."""

    index: int
    """Which request, in the order given."""
    token_ids: tuple[int, ...]
    """Tokens since the last output of this request; the end-of-sequence token is left out."""
    finish_reason: FinishReason | None
    """None while the request goes on."""


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request under way. `tokens[:cached]` have K and V in the cache; the rest is pending."""

    index: int
    request: Request
    tokens: list[int]
    cached: int = 0
    row: int | None = None
    """Row of the batch, while running."""
    slot: int | None = None
    """Slot of the cache, while running."""
    finish_reason: FinishReason | None = None

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen. 1 in decode."""
        return len(self.tokens) - self.cached

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be generated."""
        return self.request.max_tokens - (len(self.tokens) - len(self.request.prompt_ids))
