"""Serving your own model: any Flax module that appends K and V and attends can be given to the engine."""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_vattention import KVCacheSpec, attention
from jax_vattention.engine import Engine, Request

VOCABULARY, WIDTH, HEADS, HEAD_DIM = 64, 32, 2, 16


class OneLayer(nnx.Module):
    """The smallest transformer: one layer of attention between an embedding and its transpose."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * HEADS * HEAD_DIM, rngs=rngs)
        self.out = nnx.Linear(HEADS * HEAD_DIM, WIDTH, rngs=rngs)

    def __call__(self, tokens, cache, batch):
        """Tokens int32 `[tokens]` -> hidden states `[tokens, WIDTH]`, and the cache to go on with."""
        index = batch.token_index(tokens.shape[0])
        x = self.embedding(tokens)
        q, k, v = jnp.split(self.qkv(x).reshape(-1, 3 * HEADS, HEAD_DIM), 3, axis=1)
        cache = cache.append(k, v, layer=0, slots=index.slots, positions=index.positions, mask=index.mask)
        read, cache = attention(q, cache, layer=0, batch=batch)
        return x + self.out(read.reshape(-1, HEADS * HEAD_DIM)), cache

    def logits(self, hidden):
        """Hidden states `[rows, WIDTH]` -> float32 `[rows, VOCABULARY]`."""
        return self.embedding.attend(hidden)


def main() -> None:
    """Generates a few tokens for two prompts of different lengths."""
    spec = KVCacheSpec(
        num_layers=1, num_kv_heads=HEADS, head_dim=HEAD_DIM, num_slots=8, max_seq_len=4096, dtype=jnp.float32
    )
    requests = [Request(prompt_ids=(1, 2, 3), max_tokens=8), Request(prompt_ids=tuple(range(40)), max_tokens=12)]
    with Engine(OneLayer(nnx.Rngs(0)), spec, max_batch=2, pool_bytes=64 * 2**20) as engine:
        for output in engine.generate(requests):
            print(f"request {output.index}: {output.token_ids} {output.finish_reason or ''}")
        print(engine.manager.stats())


if __name__ == "__main__":
    print(jax.local_devices())
    main()
