"""Attention of prompts and of chunks of prompts on a GPU, causal, beside other libraries and a matrix product."""

from __future__ import annotations

import argparse
import functools

from benchmarks import _alternatives, _attention, _ceilings, _machine
from benchmarks._attention import Alternative, Work
from benchmarks._report import Column, Report, Table

_ALTERNATIVES: dict[str, Alternative] = {
    "cudnn": _alternatives.cudnn,
    "torch-flash": functools.partial(_alternatives.torch_sdpa, backend="FLASH_ATTENTION"),
    "torch-cudnn": functools.partial(_alternatives.torch_sdpa, backend="CUDNN_ATTENTION"),
}


def works(shapes: str) -> list[Work]:
    """What is measured: whole prompts, and chunks behind what was prefilled before."""
    if shapes == "tiny":
        return [_prompts(1, 96), _prompts(2, 48), _chunk(16, 48)]
    return [_prompts(1, 8192), _prompts(4, 4096), _prompts(1, 32_768), _chunk(2048, 30_720), _chunk(512, 4096)]


def _prompts(requests: int, tokens: int) -> Work:
    return Work.uniform(f"{requests}x{tokens}", requests, tokens, tokens)


def _chunk(tokens: int, offset: int) -> Work:
    return Work.uniform(f"{tokens} at {offset}", 1, tokens, offset + tokens)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _attention.add_arguments(parser, tuple(_ALTERNATIVES))


def run(arguments: argparse.Namespace) -> Report:
    sizes, seconds, _ = _attention.checked(arguments)
    others = _machine.OtherLoad()
    selected = _attention.chosen(works(arguments.shapes), arguments.only)
    ceiling = _ceilings.matmul_row(sizes, seconds)

    def rate(work: Work, seconds: float) -> dict[str, float]:
        tflops = 4 * sizes.num_q_heads * sizes.head_dim * work.num_pairs / seconds / 1e12
        return {"tflops": tflops, "of_product": tflops / ceiling["tflops"], "pairs": work.num_pairs}

    rows = _attention.compare(selected, arguments, _ALTERNATIVES, rate)
    tables = (_ceilings.table([ceiling]), Table("Attention of a prefill", _COLUMNS, tuple(rows)))
    return _attention.report("prefill", arguments, tables, _NOTES, others)


_COLUMNS = (
    Column("shape", "prompts"),
    Column("implementation", "implementation"),
    *_attention.TIME_COLUMNS,
    Column("tflops", "TFLOP/s", ",.1f"),
    Column("of_product", "of product", ".3f"),
    Column("against_ours", "time, ours = 1", ".2f"),
    Column("note", "note"),
)
_NOTES = (
    "TFLOP/s: 4 x query heads x head dim for each pair of a query and a key that it sees. of product: as a share of "
    "the matrix product above.",
    "ours: the first jax_vattention row of a shape that ran; attention() tries them in that order.",
    "cudnn: jax.nn.dot_product_attention. Its causal mask counts from the first key, so for a chunk it is called "
    "without a mask and also multiplies the few pairs that causality hides; they are not counted. torch: "
    "scaled_dot_product_attention with the backend named; for a chunk with its lower-right causal mask.",
)
