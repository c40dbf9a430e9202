"""Attention over the contiguous view of a KV cache."""

from .api import attention as attention
from .api import implementations as implementations
from .api import picked as picked

__all__ = ["attention", "implementations", "picked"]
