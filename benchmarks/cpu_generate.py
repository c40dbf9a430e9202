"""Decode and prefill speed on a CPU in float32: this package's engine and `transformers`, same weights, same prompts.

Prompts have one length, so transformers needs no padding. Runs take turns in one process. An end-of-sequence token
ends nothing. Prefill is the time until every prompt has its first token, decode the time from there to the last
token; loading and compiling are in neither.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import jax
import numpy as np

from benchmarks import _machine
from benchmarks._report import Column, Report, Table
from benchmarks._timing import Timing, interleave
from benchmarks._transformers import PACKAGES, Run, Transformers, require

_NUM_SLOTS = 64
_TEXTS = (
    "The library at the end of the street had been closed for eleven years when the council found a key that fitted. ",
    "A bridge is a promise that two sides of a river make to each other, and engineers are the ones who must keep it. ",
    "In the spring of that year the farmers noticed that the bees had come back, first a few, and later whole swarms. ",
    "To repair an old clock, begin with patience: open the case, look for dust, and do not touch the hairspring. ",
    "Water boils at a lower temperature in the mountains because the air presses less on it than it does by the sea. ",
    "The first computers filled whole rooms, needed a staff of operators, and could do less than a watch does today. ",
    "She wrote the letter three times, and each time it became shorter, until only her name and a question were left. ",
    "Bread needs flour, water, salt and time; of these four the last is the one that most recipes ask too little of. ",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m-instruct", help="for models.load (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8], metavar="N", help="default: 1 4 8")
    parser.add_argument("--prompt-tokens", type=int, default=40, metavar="N", help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=129, metavar="N", help="the first comes from prefill")
    parser.add_argument("--long-prompt", type=int, default=512, metavar="N", help="of the last row of prefill")
    parser.add_argument("--prefill-tokens", type=int, default=256, metavar="N", help="per program of the engine")
    parser.add_argument("--decode-tokens", type=int, default=8, metavar="N", help="per program of the engine")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of each variant (default: %(default)s)")


def run(arguments: argparse.Namespace) -> Report:
    for package in PACKAGES:
        require(package)
    jax.config.update("jax_platforms", "cpu")
    from jax_vattention import models

    loaded = models.load(arguments.model, dtype="float32")
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(_state(loaded.model)))
    theirs = Transformers(loaded.model, threads=len(os.sched_getaffinity(0)))
    bandwidths = [_machine.read_bandwidth()]
    others = _machine.OtherLoad()
    rows = []
    for batch in arguments.batches:
        prompts = _prompts(loaded.tokenizer, batch, arguments.prompt_tokens)
        rows.append(_compare(arguments, loaded, theirs, prompts, arguments.new_tokens))
        bandwidths.append(_machine.read_bandwidth())
    long_prompt = _prompts(loaded.tokenizer, 1, arguments.long_prompt)
    long_row = _compare(arguments, loaded, theirs, long_prompt, new_tokens=1)
    busy_elsewhere = others.share()
    bandwidth = max(bandwidths)
    for row in rows:
        row["floor_ms"] = (weight_bytes + row["kv_bytes_read"]) / bandwidth / 1e6
    return Report(
        name="cpu_generate",
        command="",
        date=datetime.date.today().isoformat(),
        hardware=_machine.hardware(),
        versions=_machine.versions(PACKAGES),
        settings={
            "model": arguments.model,
            "dtype": "float32",
            "prompt_tokens": arguments.prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "prefill_tokens": arguments.prefill_tokens,
            "decode_tokens": arguments.decode_tokens,
            "repeats": arguments.repeats,
            "weight_bytes": weight_bytes,
            "read_bandwidth_gb_s": [round(value, 2) for value in bandwidths],
            "transformers_attention": theirs.attention,
            "other_programs_cpu_share": round(busy_elsewhere, 3),
        },
        tables=(
            Table("Decode", _DECODE, tuple(rows)),
            Table("Prefill", _PREFILL, (*rows, long_row)),
            Table("Variants of transformers, decode", _VARIANTS, tuple(_variant_rows(rows))),
            Table("KV cache of jax_vattention", _MEMORY, tuple(rows)),
        ),
        notes=(
            "tokens/s are medians; in brackets the slowest and the fastest run. Ratios are of medians, to the fastest "
            "variant of transformers in that row.",
            f"torch had {theirs.threads} threads where no other number is given, JAX its default.",
            f"Other programs took {busy_elsewhere:.0%} of the CPU."
            + (" That is too much for a record: run it again on a quiet machine." if busy_elsewhere > 0.05 else ""),
            "The engine pads prompts to a power of two, and splits what is longer than prefill_tokens: both count.",
            f"Floor: weights and mean K and V of a step, read at {bandwidth:.1f} GB/s (numpy, all cores).",
        ),
    )


_DECODE = (
    Column("batch", "batch"),
    Column("ours_decode", "jax_vattention, tokens/s", ".1f"),
    Column("ours_decode_spread", "range"),
    Column("theirs_decode", "transformers, tokens/s", ".1f"),
    Column("theirs_decode_spread", "range"),
    Column("decode_ratio", "ratio", ".2f"),
    Column("ours_step_ms", "jax_vattention, ms a step", ".1f"),
    Column("theirs_step_ms", "transformers, ms a step", ".1f"),
    Column("floor_ms", "floor, ms", ".1f"),
    Column("same_tokens", "same tokens"),
)
_PREFILL = (
    Column("batch", "batch"),
    Column("prompt_tokens", "prompt tokens"),
    Column("ours_prefill", "jax_vattention, tokens/s", ".0f"),
    Column("ours_prefill_spread", "range"),
    Column("theirs_prefill", "transformers, tokens/s", ".0f"),
    Column("theirs_prefill_spread", "range"),
    Column("prefill_ratio", "ratio", ".2f"),
)
_VARIANTS = (
    Column("batch", "batch"),
    Column("variant", "variant"),
    Column("decode", "tokens/s", ".1f"),
    Column("spread", "range"),
    Column("step_ms", "ms a step", ".1f"),
)
_MEMORY = (
    Column("batch", "batch"),
    Column("kv_tokens", "tokens cached"),
    Column("kv_virtual_mib", "virtual MiB", ".0f"),
    Column("kv_mapped_mib", "mapped MiB, peak", ".1f"),
    Column("kv_needed_mib", "MiB of K and V", ".1f"),
)


def _state(model: Any) -> Any:
    from flax import nnx

    return nnx.state(model)


def _prompts(tokenizer: Any, batch: int, length: int) -> np.ndarray:
    """int32 `[batch, length]`: different texts, each repeated and cut to one length."""
    prompts = []
    for row in range(batch):
        text = _TEXTS[row % len(_TEXTS)]
        ids = list(tokenizer.encode(f"{row + 1}. {text}" + text * (length // 8)))
        prompts.append(ids[:length])
    return np.array(prompts, np.int32)


def _compare(
    arguments: argparse.Namespace, loaded: Any, theirs: Transformers, prompts: np.ndarray, new_tokens: int
) -> dict[str, Any]:
    """One row: ours and every variant of theirs in turn, over the same prompts."""
    from jax_vattention.engine import Engine

    batch, prompt_tokens = prompts.shape
    spec = loaded.config.kv_cache_spec(num_slots=_NUM_SLOTS, dtype="float32")
    with Engine(
        loaded.model,
        spec,
        max_batch=batch,
        prefill_tokens=arguments.prefill_tokens,
        decode_tokens=arguments.decode_tokens,
        device=jax.devices("cpu")[0],
    ) as engine:
        actions: dict[str, Callable[[], Run]] = {
            "ours": partial(_generate, engine, prompts, new_tokens),
            "loop": partial(theirs.loop, prompts, new_tokens),
            # Threads of OpenMP wait for each other: where other programs take a core, one thread is faster than all.
            "loop, 1 thread": partial(theirs.loop, prompts, new_tokens, threads=1),
            "generate": partial(theirs.generate, prompts, new_tokens),
            "generate, static cache": partial(theirs.generate_static, prompts, new_tokens),
        }
        runs = dict(zip(actions, interleave(list(actions.values()), arguments.repeats), strict=True))
        stats = engine.manager.stats()
    row: dict[str, Any] = {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "same_tokens": _same_tokens(runs),
        "variants": {name: [dataclasses.astuple(run)[:2] for run in found] for name, found in runs.items()},
        # A step reads what is cached before it; the mean over the steps.
        "kv_bytes_read": batch * spec.token_bytes * (prompt_tokens + new_tokens / 2),
        "kv_tokens": batch * (prompt_tokens + new_tokens - 1),
        "kv_virtual_mib": stats.virtual_bytes / 2**20,
        "kv_mapped_mib": stats.mapped_bytes_peak / 2**20,
        "kv_needed_mib": batch * (prompt_tokens + new_tokens - 1) * spec.token_bytes / 2**20,
    }
    row |= _speeds(runs, "prefill", prompts.size)
    if new_tokens > 1:
        row |= _speeds(runs, "decode", batch * (new_tokens - 1))
        row["ours_step_ms"], row["theirs_step_ms"] = (1e3 * batch / row[f"{who}_decode"] for who in ("ours", "theirs"))
    return row


def _generate(engine: Any, prompts: np.ndarray, new_tokens: int) -> Run:
    """Wall time of the engine: all host work between programs counts; compiling, once in the warm-up, does not."""
    from jax_vattention.engine import Request

    tokens: list[list[int]] = [[] for _ in prompts]
    requests = [Request(tuple(prompt.tolist()), new_tokens) for prompt in prompts]
    start = perf_counter()
    first = None
    for output in engine.generate(requests):
        tokens[output.index] += output.token_ids
        # Prefill comes before decode: it is over when every prompt has its first token.
        if first is None and all(tokens):
            first = perf_counter()
    end = perf_counter()
    first = first or end
    return Run(first - start, end - first, np.array(tokens, np.int64))


def _speeds(runs: dict[str, list[Run]], phase: str, tokens: int) -> dict[str, Any]:
    """Tokens a second of ours and of the fastest variant of theirs."""
    timings = {name: Timing.of(getattr(run, f"{phase}_seconds") for run in found) for name, found in runs.items()}
    ours = timings.pop("ours")
    fastest = min(timings, key=lambda name: timings[name].median)
    theirs = timings[fastest]
    return {
        f"ours_{phase}": tokens / ours.median,
        f"ours_{phase}_spread": _spread(ours, tokens),
        f"theirs_{phase}": tokens / theirs.median,
        f"theirs_{phase}_spread": _spread(theirs, tokens),
        f"theirs_{phase}_variant": fastest,
        f"{phase}_ratio": theirs.median / ours.median,
    }


def _spread(timing: Timing, tokens: int) -> str:
    return f"({tokens / timing.worst:.1f} to {tokens / timing.best:.1f})"


def _variant_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    result = []
    for row in rows:
        for name, runs in row["variants"].items():
            if name == "ours":
                continue
            timing = Timing.of(decode for _, decode in runs)
            steps = row["kv_tokens"] // row["batch"] - row["prompt_tokens"]
            tokens = row["batch"] * steps
            result.append(
                {
                    "batch": row["batch"],
                    "variant": name,
                    "decode": tokens / timing.median,
                    "spread": _spread(timing, tokens),
                    "step_ms": 1e3 * timing.median / steps,
                }
            )
    return result


def _same_tokens(runs: dict[str, list[Run]]) -> str:
    """Whether every run of every variant produced the same tokens; if not, where the first difference is."""
    expected = runs["ours"][0].tokens
    different = [
        run.tokens != expected for found in runs.values() for run in found if not np.array_equal(run.tokens, expected)
    ]
    if not different:
        return "all"
    return f"differ from token {min(int(np.argmax(d.any(0))) for d in different)} on"
