"""A KV cache for JAX that is contiguous in virtual memory and gets physical pages on demand."""

try:
    from jax_vattention import _native as _native
except ImportError as error:
    raise ImportError(
        "jax_vattention's native module is not here. In a clone, Python finds the source folder before an installed "
        "package: install with 'pip install -e .', or run from another folder"
    ) from error

from jax_vattention.attention import attention as attention
from jax_vattention.batch import RaggedBatch as RaggedBatch
from jax_vattention.batch import TokenIndex as TokenIndex
from jax_vattention.cache import GPU_COMPILER_OPTIONS as GPU_COMPILER_OPTIONS
from jax_vattention.cache import KVCache as KVCache
from jax_vattention.manager import CacheStats as CacheStats
from jax_vattention.manager import KVCacheManager as KVCacheManager
from jax_vattention.spec import KVCacheSpec as KVCacheSpec

__version__ = "0.1.0"
