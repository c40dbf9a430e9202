r"""The native core under sanitizers: threads race for pages while calls of the backend fail (native/stress.cc).

The other tests can run on a module that was built with sanitizers, beside a Python and a jaxlib that were not:

    pip install -e . -C build-dir=build/sanitize -C cmake.build-type=Debug \
      -C cmake.define.JAX_VATTENTION_SANITIZE=thread
    setarch -R env LD_PRELOAD=$(c++ -print-file-name=libtsan.so) \
      TSAN_OPTIONS=ignore_noninstrumented_modules=1:handle_segv=0:suppressions=$PWD/tests/native/tsan.supp \
      python -m pytest -m "not gpu" tests/test_memory.py tests/test_manager.py tests/test_failures.py

With `address,undefined` instead of `thread`:

    env LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)" \
      ASAN_OPTIONS=detect_leaks=0:handle_segv=0 UBSAN_OPTIONS=halt_on_error=1 python -m pytest ...
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    ROOT / "tests/native/stress.cc",
    *(ROOT / f"xla_ffi/{name}.cc" for name in ("mapper", "page_pool", "paged_buffer", "vmm", "vmm_host")),
]
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    "ASAN_OPTIONS": "strict_string_checks=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler: install one, or set CXX")
    return found


def build(program: Path, sanitizers: str, *sources: Path) -> subprocess.CompletedProcess:
    command = [compiler(), "-std=c++17", "-g", "-O1", "-fno-omit-frame-pointer", "-pthread", f"-I{ROOT / 'xla_ffi'}"]
    command += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-o", str(program), *map(str, sources)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | OPTIONS)


def launcher(folder: Path, sanitizers: str) -> list[str]:
    """How to start a program so that its sanitizers work. Skips where a program that does nothing fails with them."""
    nothing = folder / "nothing"
    nothing.with_suffix(".cc").write_text("int main() {}\n")
    failed = build(nothing, sanitizers, nothing.with_suffix(".cc"))
    if failed.returncode == 0:
        # TSan needs some addresses for itself, and the kernel may give those away where it draws them at random.
        fixed = [["setarch", "-R"]] if shutil.which("setarch") else []
        for prefix in (*fixed, []):
            failed = run([*prefix, str(nothing)])
            if failed.returncode == 0:
                return prefix
    pytest.skip(f"-fsanitize={sanitizers} does not work here: {failed.stderr.strip()[:200]}")


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_threads_race_for_pages_while_calls_fail(tmp_path, sanitizers):
    prefix = launcher(tmp_path, sanitizers)
    built = build(tmp_path / "stress", sanitizers, *SOURCES)
    assert built.returncode == 0, built.stderr
    done = run([*prefix, str(tmp_path / "stress"), "10000", "4", "1"])  # iterations, threads, seed
    # The calls that were made to fail are logged.
    report = [line for line in done.stderr.splitlines() if not line.startswith("jax_vattention: ")]
    assert not report, "\n".join(report)
    assert done.returncode == 0
    counts = dict(re.findall(r"(\w+)=(\d+)", done.stdout))
    assert set(counts) == {"done", "failed", "out_of_pages", "refused", "injected"}
    assert all(int(count) > 100 for count in counts.values()), counts
