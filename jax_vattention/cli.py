"""The command line: `generate` continues prompts with a real model, `info` says what there is to run on, `draw` makes a
picture of a cache."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_vattention.engine import Engine, Request
    from jax_vattention.models import Tokenizer

_NUM_SLOTS = 64  # slots cost virtual memory only
_MAX_BATCH = 16
_PROGRESS_SECONDS = 1.0  # loads that take longer than this show a progress line
_MOST_TOKENS = 2**31 - 1
_MOST_SEED = 2**32 - 1
_DTYPES = ("float32", "bfloat16", "float16")
_KV_DTYPES = (*_DTYPES, "float8_e4m3fn")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, or 1 with one line that says what was wrong."""
    arguments = _parser().parse_args(argv)
    # JAX would otherwise take three quarters of the GPU at start, and leave the page pool what is left.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from jax_vattention.errors import VAttentionError

    try:
        return arguments.run(arguments)
    except (VAttentionError, ValueError, OSError, ImportError) as error:
        print(f"jax-vattention: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jax-vattention", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate", help="continue prompts", description="Continues prompts, all in one batch."
    )
    generate.set_defaults(run=_generate)
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument(
        "--model",
        default="smollm2-135m-instruct",
        metavar="NAME|DIR|FILE",
        help="a known name, a Hugging Face folder with safetensors, or a GGUF file (default: %(default)s)",
    )
    generate.add_argument(
        "--max-tokens", type=_positive, default=128, metavar="N", help="per prompt (default: %(default)s)"
    )
    generate.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="0 takes the likeliest token (default: 0)"
    )
    generate.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of the first prompt; the next has the next one (default: 0)"
    )
    generate.add_argument("--dtype", choices=_DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    generate.add_argument("--kv-dtype", choices=_KV_DTYPES, help="of the KV cache (default: that of --dtype)")
    generate.add_argument(
        "--raw", action="store_true", help="give the model the prompt as it is, without chat template"
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object a prompt, and nothing else")

    info = commands.add_parser(
        "info", help="print versions, devices and memory", description="What there is to run on."
    )
    info.set_defaults(run=_info)

    draw = commands.add_parser(
        "draw",
        help="make a picture of a cache",
        description="Draws what manager.snapshot().to_json() returned: the slots with their pages, and the pool.",
    )
    draw.set_defaults(run=_draw)
    draw.add_argument("snapshot", metavar="SNAPSHOT.json")
    draw.add_argument(
        "-o", "--output", metavar="FILE.png", help="default: the snapshot's name with .png, in the same folder"
    )
    return parser


def _number(text: str, kind: type, expected: str, most: float, least: float) -> Any:
    """A number of the command line; argparse names the argument in front of the message."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _positive(text: str) -> int:
    return _number(text, int, "a positive integer", _MOST_TOKENS, 1)


def _temperature(text: str) -> float:
    return _number(text, float, "0 or a positive number", sys.float_info.max, 0)


def _seed(text: str) -> int:
    return _number(text, int, f"an integer from 0 to {_MOST_SEED}", _MOST_SEED, 0)


def _generate(arguments: argparse.Namespace) -> int:
    import jax

    from jax_vattention import models
    from jax_vattention.engine import Engine

    device = jax.local_devices()[0]
    dtype = arguments.dtype or ("bfloat16" if device.platform == "gpu" else "float32")
    started = time.perf_counter()
    loaded = models.load(arguments.model, dtype=dtype, progress=_Progress())
    load_seconds = time.perf_counter() - started
    if loaded.tokenizer is None:
        raise models.ModelError(f"{arguments.model}: no tokenizer.json in this folder: prompts cannot be encoded")
    requests = _requests(arguments, loaded.tokenizer)
    with Engine(
        loaded.model,
        loaded.config.kv_cache_spec(num_slots=_NUM_SLOTS, dtype=arguments.kv_dtype or dtype),
        eos_ids=loaded.tokenizer.eos_ids,
        max_batch=min(len(requests), _MAX_BATCH),
        device=device,
    ) as engine:
        printer = _JsonPrinter if arguments.json else _TextPrinter
        printer(arguments.prompts, requests, loaded.tokenizer, engine, load_seconds).run()
    return 0


def _requests(arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[Request]:
    from jax_vattention.engine import Request

    def prompt_ids(prompt: str) -> list[int]:
        if not arguments.raw:
            return tokenizer.chat([{"role": "user", "content": prompt}])
        if ids := tokenizer.encode(prompt):
            return ids
        raise ValueError("a prompt is empty: with --raw there must be at least one token to continue")

    return [
        Request(
            tuple(prompt_ids(prompt)),
            arguments.max_tokens,
            arguments.temperature,
            (arguments.seed + index) % (_MOST_SEED + 1),
        )
        for index, prompt in enumerate(arguments.prompts)
    ]


class _Printer:
    """Runs requests and prints what comes."""

    def __init__(
        self, prompts: Sequence[str], requests: list[Request], tokenizer: Tokenizer, engine: Engine, load_seconds: float
    ):
        self.prompts = prompts
        self.requests = requests
        self.tokenizer = tokenizer
        self.engine = engine
        self.load_seconds = load_seconds
        self.token_ids: list[list[int]] = [[] for _ in requests]
        self.finish_reasons: list[str | None] = [None] * len(requests)

    def run(self) -> None:
        for output in self.engine.generate(self.requests):
            self.token_ids[output.index].extend(output.token_ids)
            self.finish_reasons[output.index] = output.finish_reason
            self.on_tokens(output.index, output.token_ids)
        self.on_end()

    def on_tokens(self, index: int, token_ids: Sequence[int]) -> None:
        """New tokens of one prompt."""

    def on_end(self) -> None:
        """All prompts have ended."""


class _TextPrinter(_Printer):
    """Streams the first prompt that has not ended; those behind it are held back until it is their turn."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.decoders = [self.tokenizer.stream() for _ in self.requests]
        self.held = [""] * len(self.requests)
        self.current = 0

    def run(self) -> None:
        self._heading()
        super().run()

    def on_tokens(self, index: int, token_ids: Sequence[int]) -> None:
        decoder = self.decoders[index]
        self.held[index] += "".join(decoder.push(token) for token in token_ids)
        if self.finish_reasons[index] is not None:
            self.held[index] += decoder.finish()
        while self.current < len(self.prompts):
            print(self.held[self.current], end="", flush=True)
            self.held[self.current] = ""
            if self.finish_reasons[self.current] is None:
                return
            print(flush=True)
            self.current += 1
            self._heading()

    def on_end(self) -> None:
        stats = self.engine.manager.stats()
        tokens = sum(len(ids) for ids in self.token_ids)
        seconds = self.engine.decode_seconds
        print(
            f"[KV cache: {_bytes(stats.virtual_bytes)} virtual, {_bytes(stats.mapped_bytes_peak)} physical at most "
            f"({stats.pages_peak} pages of {_bytes(stats.page_bytes)}); {tokens} tokens, decode {seconds:.2f} s, "
            f"compile {self.engine.compile_seconds:.1f} s, load {self.load_seconds:.1f} s]",
            file=sys.stderr,
        )

    def _heading(self) -> None:
        if len(self.prompts) > 1 and self.current < len(self.prompts):
            print(f"\n> {self.prompts[self.current]}", flush=True)


class _JsonPrinter(_Printer):
    """One object a prompt. `kv` and `seconds` are those of the batch that the prompts shared."""

    def on_end(self) -> None:
        stats = self.engine.manager.stats()
        for index, prompt in enumerate(self.prompts):
            result = {
                "prompt": prompt,
                "text": self.tokenizer.decode(self.token_ids[index]),
                "token_ids": self.token_ids[index],
                "prompt_tokens": len(self.requests[index].prompt_ids),
                "finish_reason": self.finish_reasons[index],
                "kv": {
                    "virtual_bytes": stats.virtual_bytes,
                    "mapped_bytes_peak": stats.mapped_bytes_peak,
                    "page_bytes": stats.page_bytes,
                    "pages_peak": stats.pages_peak,
                },
                "seconds": {
                    "load": round(self.load_seconds, 4),
                    "compile": round(self.engine.compile_seconds, 4),
                    "prefill": round(self.engine.prefill_seconds, 4),
                    "decode": round(self.engine.decode_seconds, 4),
                },
            }
            print(json.dumps(result, ensure_ascii=False), flush=True)


class _Progress:
    """A line on stderr about a load that takes long; on a terminal it is drawn over."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._shown_at: float | None = None

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now = time.perf_counter()
        finished = done_bytes >= total_bytes
        if self._shown_at is None and (finished or now - self._start < _PROGRESS_SECONDS):
            return
        if not finished and self._shown_at is not None and now - self._shown_at < _PROGRESS_SECONDS / 4:
            return
        self._shown_at = now
        line = f"loading: {_bytes(done_bytes)} of {_bytes(total_bytes)} ({done_bytes / max(1, total_bytes):.0%})"
        end = "\n" if finished or not sys.stderr.isatty() else ""
        print(("\r" if sys.stderr.isatty() else "") + line, end=end, file=sys.stderr, flush=True)


def _info(arguments: argparse.Namespace) -> int:
    del arguments
    import flax
    import jax
    import jaxlib

    import jax_vattention
    from jax_vattention.errors import VAttentionError
    from jax_vattention.memory import open_memory

    print(f"jax_vattention {jax_vattention.__version__}")
    print(
        f"python {sys.version.split()[0]}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, flax {flax.__version__}"
    )
    for device in jax.local_devices():
        print(f"device {device.id}: {device.device_kind} ({device.platform}, {device.client.platform_version.strip()})")
        try:
            memory = open_memory(device)
            free_bytes, total_bytes = memory.info()
        except VAttentionError as error:
            print(f"  no backend: {error}")
            continue
        print(f"  backend {memory.platform}, granularity {_bytes(memory.granularity)}")
        print(f"  memory: {_bytes(free_bytes)} free of {_bytes(total_bytes)}")
    return 0


def _draw(arguments: argparse.Namespace) -> int:
    from jax_vattention import picture

    snapshot = picture.load(arguments.snapshot)
    output = arguments.output or os.path.splitext(arguments.snapshot)[0] + ".png"
    picture.save(snapshot, output)
    print(output)
    return 0


def _bytes(count: float) -> str:
    """A number of bytes as a person reads it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count == int(count) else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
