"""`python -m benchmarks NAME [--json [FILE]]` runs a benchmark; `python -m benchmarks table FILE` shows its tables."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import _stop
from benchmarks._report import BenchmarkError, Report

BENCHMARKS = {
    "accuracy": "error of attention against float64, on ordinary and hostile inputs, beside cuDNN",
    "cpu_generate": "decode and prefill on a CPU, float32: this package and transformers",
    "decode": "attention of decode steps on a GPU: GB/s beside a copy, cuDNN, torch and FlashInfer",
    "decode_step": "a decode loop over page boundaries: mapped beforehand, synchronously, in the background",
    "launches": "kernels that a GPU starts in each layer of a decode step, from a trace of jax.profiler",
    "manager": "three KV caches in the same memory serve a request trace; the host cost of a step",
    "mixed": "attention of a prefill chunk and of decodes on a GPU: in one call and in two",
    "prefill": "attention of prompts and chunks on a GPU: TFLOP/s beside a matrix product, cuDNN and torch",
    "tune": "tile sizes of the kernels for Hopper GPUs, and the file that holds the fastest",
    "vmm": "mapping and unmapping pages, and the manager's work between two programs",
}
"""Each is a module of this package with `add_arguments(parser)` and `run(arguments) -> Report`."""

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else None
    if name == "table":
        return _table(argv[1:])
    if name not in BENCHMARKS:
        if name in ("-h", "--help"):
            print(_usage())
            return 0
        print(f"{_usage()}\n\nexpected a NAME, got {'nothing' if name is None else repr(name)}", file=sys.stderr)
        return 2
    return _run(name, argv[1:])


def _usage() -> str:
    names = "\n".join(f"  {name:14}{summary}" for name, summary in BENCHMARKS.items())
    return (
        "usage: python -m benchmarks NAME [--json [FILE]] [options of the benchmark: NAME --help]\n"
        f"       python -m benchmarks table FILE\n\nNAME is one of:\n{names}"
    )


def _run(name: str, argv: Sequence[str]) -> int:
    # JAX would otherwise take three quarters of a GPU at start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=module.__doc__)
    parser.add_argument(
        "--json",
        nargs="?",
        const="",
        metavar="FILE",
        help="write the report (default FILE: benchmarks/results/NAME.<machine>.json)",
    )
    module.add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        # Those that can leave rows out do so when they are told to stop.
        with _stop.heeded() if hasattr(arguments, "limit") else contextlib.nullcontext():
            report: Report = module.run(arguments)
    except (BenchmarkError, ModuleNotFoundError) as error:
        print(f"benchmark {name}: error: {error}", file=sys.stderr)
        return 1
    report = dataclasses.replace(report, command=_command(name, argv, arguments.json))
    print(report.text())
    if arguments.json is not None:
        from benchmarks._machine import label

        path = Path(arguments.json) if arguments.json else RESULTS / f"{name}.{label(report.hardware)}.json"
        report.write(path)
        print(f"wrote {path}", file=sys.stderr)
    return 0


def _command(name: str, argv: Sequence[str], json_file: str | None) -> str:
    """What repeats a run. Folders that others do not have are left out: all of --json, and where an input lay."""
    kept = [value for value in argv if not value.startswith("--json") and not (json_file and value == json_file)]
    return shlex.join(["python", "-m", "benchmarks", name, *map(_without_folder, kept)])


def _without_folder(value: str) -> str:
    """An argument as it is, but of a path that leads out of the repository only the last part."""
    option, equals, path = value.rpartition("=")
    if os.sep not in path or Path(path).resolve().is_relative_to(Path(__file__).resolve().parents[1]):
        return value
    return f"{option}{equals}{Path(path).name}"


def _table(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks table", description="Prints a report as markdown.")
    parser.add_argument("file", metavar="FILE", help="a JSON file that a benchmark wrote")
    try:
        print(Report.read(parser.parse_args(argv).file).markdown())
    except (OSError, ValueError) as error:
        print(f"table: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
