"""Attention over the contiguous view of a KV cache."""

from .api import attention as attention
from .api import implementations as implementations

__all__ = ["attention", "implementations"]
