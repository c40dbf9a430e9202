"""A KV cache for JAX that is contiguous in virtual memory and gets physical pages on demand."""

from jax_vattention.attention import attention as attention
from jax_vattention.batch import RaggedBatch as RaggedBatch
from jax_vattention.batch import TokenIndex as TokenIndex
from jax_vattention.cache import GPU_COMPILER_OPTIONS as GPU_COMPILER_OPTIONS
from jax_vattention.cache import KVCache as KVCache
from jax_vattention.manager import KVCacheManager as KVCacheManager
from jax_vattention.spec import KVCacheSpec as KVCacheSpec
from jax_vattention.spec import LayerGroup as LayerGroup
from jax_vattention.stats import CacheStats as CacheStats

__version__ = "0.1.0"
