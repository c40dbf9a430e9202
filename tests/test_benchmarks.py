"""The benchmarks' reports and tables, and what they count. No time is checked."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import shlex
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import plain_cache, read_token

from benchmarks import __main__ as command
from benchmarks import _alternatives, _attention, _timing, _trace, accuracy, decode, launches, tune
from benchmarks._attention import Outcome
from benchmarks._report import Column, Report, Table
from benchmarks._timing import Timing, back_to_back, interleave
from jax_vattention import KVCacheSpec
from jax_vattention.attention import decode_shape, mosaic_prefill, target, tilings
from jax_vattention.attention.tilings import tuned


@pytest.fixture
def report():
    table = Table(
        "Speed",
        (Column("batch", "batch"), Column("speed", "tokens/s", ".1f"), Column("same", "same tokens")),
        ({"batch": 1, "speed": 40.26, "same": "all", "raw": [0.1]}, {"batch": 4, "speed": None, "same": "all"}),
    )
    return Report(
        name="example",
        command="python -m benchmarks example",
        date="2026-11-24",
        hardware={"cpu": "Some CPU", "cores": "2", "jax device": "cpu"},
        versions={"jax": "0.10.2"},
        settings={"repeats": 5},
        tables=(table,),
        notes=("A note.",),
    )


def test_table_command_prints_the_same_as_the_report(report, tmp_path, capsys):
    path = tmp_path / "results" / "example.json"
    report.write(path)
    assert Report.read(path) == report
    assert command.main(["table", str(path)]) == 0
    out = capsys.readouterr().out
    assert out == report.markdown() + "\n"
    assert "| batch | tokens/s | same tokens |\n| ----: | -------: | ----------- |\n|     1 |     40.3 | all " in out
    assert "|     4 |        - |" in out
    assert "`python -m benchmarks example`" in out


@pytest.mark.parametrize("content", ["{}", "[]", '{"format": 99}', "no json"])
def test_table_command_refuses_other_files(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert command.main(["table", str(path)]) == 1
    assert "table: error:" in capsys.readouterr().err


def test_unknown_name_lists_the_names(capsys):
    assert command.main(["nope"]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("'nope'", *command.BENCHMARKS))


def test_timing_and_interleaving():
    timing = Timing.of([3.0, 1.0, 2.0, 10.0])
    assert (timing.best, timing.median, timing.worst) == (1.0, 2.5, 10.0)
    assert (timing.quantile(0.5), timing.quantile(0.99), timing.quantile(0.0)) == (2.0, 10.0, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        Timing.of([])
    calls = []
    results = interleave([lambda: calls.append("a"), lambda: calls.append("b")], repeats=2)
    assert [len(found) for found in results] == [2, 2]
    assert "".join(calls) == "ba" + "ab" + "ba"


def test_back_to_back_takes_off_what_launching_and_waiting_cost(monkeypatch):
    now, waited = [0.0], []
    monkeypatch.setattr(_timing, "perf_counter", lambda: now[0])

    def launch():
        now[0] += 0.002

    def wait(_):
        waited.append(0)
        now[0] += 0.01

    timing = back_to_back(launch, wait, seconds=0.1, fewest=4, most=9)
    assert timing.seconds == pytest.approx([0.002] * len(timing.seconds))
    assert 4 <= len(timing.seconds) <= 9
    # Two waits for each measurement: after one launch, and after several.
    assert len(waited) > 2 * len(timing.seconds)
    assert timing.divided(4).median == pytest.approx(timing.median / 4)


@pytest.mark.parametrize("options", [["--json", "/out/file.json"], ["--json=/out/file.json"], ["--json"], []])
def test_command_leaves_out_where_the_report_went(options):
    file = "/out/file.json" if options and options != ["--json"] else None
    assert command._command("vmm", ["--pages", "8", *options], file) == "python -m benchmarks vmm --pages 8"


@pytest.fixture(scope="module")
def vmm(tmp_path_factory):
    """The tables of a small run on this machine's CPU, by title."""
    path = tmp_path_factory.mktemp("vmm") / "vmm.json"
    small = ["--pages", "2", "--slots", "4", "--steps", "3", "--prompt-tokens", "72", "--repeats", "2"]
    assert command.main(["vmm", *small, "--json", str(path)]) == 0
    report = Report.read(path)
    assert report.command == "python -m benchmarks vmm " + " ".join(small)
    rows = {table.title: [row for row in table.rows if row["backend"] == "host"] for table in report.tables}
    assert all(row["median_us"] > 0 for row in (*rows["One page, µs"], *rows["KVCacheManager.step, µs"]))
    return rows


def test_vmm_times_every_page_size_and_every_kind_of_step(vmm):
    pages = [(row["page_kib"], row["call"], row["calls"]) for row in vmm["One page, µs"]]
    calls = ("map, new", "unmap", "map, again")
    assert pages == [(size, call, 2) for size in (64, 2048, 16384, 65536) for call in calls]
    steps = [(row["slots"], row["grows"], row["calls"]) for row in vmm["KVCacheManager.step, µs"]]
    assert steps == [(4, grows, 3) for grows in ("nothing", "one page", "one page, ahead")]


def test_vmm_counts_calls_and_waste_of_a_long_prompt(vmm):
    rows = vmm["A long prompt at the Llama-3-8B shape, 128 KiB a token"]
    assert all(row["median_ms"] > 0 for row in rows)
    # 72 tokens are 9 MiB: five pages of 2 MiB, or one of 8 and one of 2.
    for sizes, count in {"2": 5, "2 + 16": 5, "2 + 8 + 64": 2}.items():
        new, kept, new_dirty, kept_dirty = (row for row in rows if row["sizes"] == sizes)
        for row in (new, kept, new_dirty, kept_dirty):
            assert row["create"] == (count if row in (new, new_dirty) else 0)
            assert (row["pages"], row["map"], row["access"], row["other"]) == (count, count, 0, 0)
            assert bool(row["zero"]) == (row in (new, kept))
            assert row["waste"] == pytest.approx(1 / 9)
            # 36 tokens are 4.5 MiB, in pages of 2 MiB.
            assert row["waste_worst"] == pytest.approx(6 / 4.5 - 1)


def test_manager_prints_its_tables_for_the_start_of_the_sample(capsys):
    small = ["--requests", "20", "--steps", "2", "--rate", "saturated", "--caches", "ours", "on demand"]
    assert command.main(["manager", *small]) == 0
    out = capsys.readouterr().out
    for title in ("Three caches in the same memory", "Pages of KVCacheManager", "KVCacheManager.step, µs"):
        assert f"**{title}**" in out
    assert "| saturated | on demand | " in out


@pytest.fixture
def one_torch_thread():
    """Idle threads of torch spin, and those of XLA wait for their core."""
    with contextlib.suppress(ModuleNotFoundError):
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
    yield
    with contextlib.suppress(NameError):
        torch.set_num_threads(threads)


TINY = ["--shapes", "tiny", "--quick", "--seconds", "0.05", "--implementations", "reference"]


def tiny_tables(name, path, *options):
    """Tables of a tiny run on this machine's CPU, by title, and its command."""
    assert command.main([name, *TINY, *options, "--json", str(path)]) == 0
    report = Report.read(path)
    assert report.name == name
    assert report.command == "python -m benchmarks " + shlex.join([name, *TINY, *options])
    assert Report.read(path).markdown() == report.markdown()
    return {table.title: table.rows for table in report.tables}


def finite(row, *keys):
    return all(math.isfinite(row[key]) and row[key] > 0 for key in keys)


def failed(row):
    return bool(row["note"]) and row.get("us") is None


TIMES = ("us", "p10_us", "p90_us")


@pytest.mark.usefixtures("one_torch_thread")
def test_decode_compares_every_implementation_on_every_shape(tmp_path):
    shapes = ["2x96", "8 of the trace"]
    tables = tiny_tables("decode", tmp_path / "decode.json", "--only", *shapes)
    copies = tables["Ceilings of this machine"]
    assert len(copies) == 3
    assert all(failed(row) or finite(row, "gbps", *TIMES) for row in copies)
    assert finite(copies[0], "gbps")
    rows = tables["Attention of a decode step"]
    layouts = ["jax_vattention reference, token_major", "jax_vattention reference, layer_major"]
    ours = [*layouts, *(f"{name}, float8_e4m3fn" for name in layouts)]
    expected = [(shape, name) for shape in shapes for name in (*ours, "cudnn", "torch", "flashinfer")]
    assert [(row["shape"], row["implementation"]) for row in rows] == expected
    for row in rows:
        # The rows of libraries that are missing, or need a GPU, say so.
        missing = row["implementation"] not in ours and failed(row)
        assert missing or finite(row, "gbps", "of_copy", "against_ours", *TIMES)
        assert missing or row["implementation"] not in ("cudnn", "flashinfer") or jax.default_backend() == "gpu"
        if row["implementation"] == "torch" and importlib.util.find_spec("torch") and jax.default_backend() == "cpu":
            assert not missing, row["note"]
        if row["implementation"] == ours[0]:
            assert row["against_ours"] == 1
            assert row["layers"] == 2


def test_decode_lengths_are_those_of_the_trace_and_the_same_every_time():
    for shapes, requests in (("llama-3-8b", 128), ("tiny", 8)):
        ragged, again = (decode.works(shapes)[-2] for _ in range(2))
        assert ragged == again
        assert len(set(ragged.kv_lens)) > requests // 4
        assert ragged.num_queries == ragged.num_pairs - ragged.num_keys + requests == requests
        one_long = decode.works(shapes)[-1]
        assert one_long.num_keys == one_long.kv_lens[0] + (len(one_long.kv_lens) - 1) * one_long.kv_lens[1]


def test_prefill_counts_visible_pairs(tmp_path):
    tables = tiny_tables("prefill", tmp_path / "prefill.json", "--layouts", "token_major", "--against")
    [product] = tables["Ceilings of this machine"]
    assert finite(product, "tflops", *TIMES)
    rows = tables["Attention of a prefill"]
    for row, pairs in zip(rows, (96 * 97 // 2, 2 * 48 * 49 // 2, sum(range(49, 65))), strict=True):
        assert row["pairs"] == pairs
        assert row["tflops"] == pytest.approx(4 * 4 * 64 * pairs / row["us"] / 1e6)
        assert row["of_product"] == pytest.approx(row["tflops"] / product["tflops"])


# Two steps of two layers, as XLA's profiler describes them: kernels on one stream, by themselves and in a graph.
GPU_TRACE = """
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #17(MemcpyD2D,Kernel)" timestamp_ns: 1000
    EVENTS
  }
  lines { name: "XLA Ops" timestamp_ns: 1000 events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "attention_decode" } }
  event_metadata { key: 2 value { id: 2 name: "append" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2D" } }
  stat_metadata { key: 1 value { id: 1 name: "cuda_graph_id" } }
  stat_metadata { key: 2 value { id: 2 name: "kernel_details" } }
}
planes {
  name: "/host:CUPTI"
  lines { name: "Host Threads/1" timestamp_ns: 900
    events { metadata_id: 1 } events { metadata_id: 2 } events { metadata_id: 2 } events { metadata_id: 3 }
  }
  event_metadata { key: 1 value { id: 1 name: "cuGraphLaunch (CudaGraph:7)" } }
  event_metadata { key: 2 value { id: 2 name: "append" } }
  event_metadata { key: 3 value { id: 3 name: "cuEventRecord" } }
}
""".replace(
    "EVENTS",
    "\n".join(
        f"events {{ metadata_id: {kernel} offset_ps: {at}000000 duration_ps: {us}000000 {stats} }}"
        for step in range(2)
        for kernel, at, us, stats in (
            (3, 40 * step + 20, 1, ""),
            (2, 40 * step + 1, 2, "stats { metadata_id: 1 uint64_value: 7 }"),
            (1, 40 * step + 5, 10, "stats { metadata_id: 1 uint64_value: 7 } stats { metadata_id: 2 str_value: 'x' }"),
            (2, 40 * step + 22, 3, "stats { metadata_id: 1 uint64_value: 0 }"),
            (1, 40 * step + 26, 12, ""),
        )
    ),
)


def test_launches_are_read_from_a_trace():
    from jax.profiler import ProfileData

    trace = _trace.Trace.of(ProfileData.from_text_proto(GPU_TRACE))
    assert [operation.name for operation in trace.operations][:5] == [
        *("append", "attention_decode", "MemcpyD2D", "append", "attention_decode")
    ]
    measured = launches.Measured(trace, Timing.of([80e-6, 60e-6, 100e-6]), layers=2, steps=2)
    row = launches.summary(measured)
    assert row == {
        "wall_us": pytest.approx(40),
        "layers": 2,
        "launches": 2.5,
        "copies": 0.5,
        "busy_us": pytest.approx(14),
        "in_graphs": 0.4,
        "graph_launches": 0.5,
        "single_launches": 3.0,
    }
    kernels = [(row["kernel"], row["launches"], row["busy_us"]) for row in launches.by_kernel(measured)]
    assert kernels == [("attention_decode", 1, 11), ("append", 1, 2.5), ("MemcpyD2D", 0.5, 0.5)]
    assert sum(row["in_graphs"] * row["launches"] for row in launches.by_kernel(measured)) == 1


def test_launches_of_every_program(tmp_path):
    tables = tiny_tables("launches", tmp_path / "launches.json")
    rows = tables["Launches of a layer of a decode step"]
    ours = [f"append and reference, {layout}" for layout in _attention.LAYOUTS]
    assert [row["program"] for row in rows] == [*ours, "engine decode"]
    for row in rows:
        assert finite(row, "wall_us")
        assert finite(row, "launches", "busy_us") if jax.default_backend() == "gpu" else row["note"]
        assert (row["program"] in {each["program"] for each in tables["By kernel, of a layer"]}) == (not row["note"])


def test_mixed_compares_one_call_with_two(tmp_path):
    options = ["--layouts", "token_major", "--only", "16 at 32, 3x32"]
    path = tmp_path / "mixed.json"
    assert command.main(["mixed", *TINY, *options, "--json", str(path)]) == 0
    [table] = Report.read(path).tables
    [row] = table.rows
    assert finite(row, "mixed_us", "mixed_p10_us", "mixed_p90_us")
    assert row["larger_us"] == max(row["chunk_us"], row["decodes_us"])
    assert row["ratio"] == row["mixed_us"] / row["larger_us"]
    assert row["of_sum"] < row["ratio"]
    assert row["note"] == ""


def test_accuracy_compares_with_float64_and_with_cudnn(tmp_path):
    path = tmp_path / "accuracy.json"
    options = ["--shapes", "tiny", "--implementations", "reference"]
    assert command.main(["accuracy", *options, "--json", str(path)]) == 0
    [table] = Report.read(path).tables
    names = [case.name for case in accuracy.cases("tiny")]
    assert len(set(names)) == 6
    assert [row["inputs"] for row in table.rows] == [name for name in names for _ in _attention.LAYOUTS]
    for row in table.rows:
        assert 0 <= row["error"] < 4e-3, "more than rounding to bfloat16"
        if jax.default_backend() == "gpu":
            assert row["ratio"] == max(row["error"], 1e-6) / max(row["cudnn_error"], 1e-6)
        else:
            assert row["note"].startswith("cudnn: ")
            assert row["cudnn_error"] is None


@pytest.mark.parametrize("case", accuracy.cases("tiny"), ids=lambda case: f"{case.name}, {case.step}")
def test_accuracy_asks_cudnn_for_the_same(case):
    """By XLA in the place of cuDNN."""
    inputs = case.inputs(_attention.SIZES["tiny"])
    expected = accuracy.exact(case, inputs)
    found = accuracy.cudnn(case, inputs, implementation="xla")
    assert found.shape == expected.shape
    assert accuracy.relative_error(case, found, expected) < 1.5e-2


def test_accuracy_takes_the_request_with_the_largest_error():
    case = accuracy.Case("", (1, 0, 2), (4, 3, 5))
    expected = np.ones((3, 2, 4))
    found = expected.copy()
    found[0] *= 1.25
    found[2] *= 1.5
    assert accuracy.relative_error(case, found, expected) == pytest.approx(0.5 / 2**0.5)
    found[0, 0, 0] = np.nan
    assert math.isnan(accuracy.relative_error(case, found, expected))


@pytest.mark.parametrize("name", ["decode", "launches", "prefill", "mixed"])
def test_attention_benchmarks_refuse_a_machine_without_a_gpu(name, capsys, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    assert command.main([name]) == 1
    assert f"benchmark {name}: error: expected an NVIDIA GPU" in capsys.readouterr().err
    assert command.main([name, *TINY, "--only", "1x7"]) == 1
    assert "--only: expected some of" in capsys.readouterr().err


@pytest.mark.parametrize("layout", _attention.LAYOUTS)
def test_caches_are_filled_with_random_tokens_in_the_layers_that_are_read(layout):
    work = _attention.Work("", (1, 1), (37, 5))
    sizes = _attention.SIZES["tiny"]
    with _attention.manager_for(work, sizes, layout) as manager:
        slots = _attention.fill(manager, work.kv_lens, sizes.layers)
        cache = manager.step({})
        tokens = [read_token(cache, slot, position) for slot, position in zip(slots * 2, (0, 0, 36, 4), strict=True)]
        del cache
    found = {float(each[layer].std()) for each in tokens for layer in sizes.layers}
    assert len(found) == len(tokens) * len(sizes.layers)  # all different
    assert all(0.5 < deviation < 2 for deviation in found)


@pytest.mark.skipif("jax.default_backend() == 'gpu'", reason="triton does not raise there")
def test_an_implementation_that_raises_becomes_a_row_and_its_cache_is_freed():
    work = _attention.Work.uniform("2x32", 2, 1, 32)
    sizes = _attention.SIZES["tiny"]
    parts = {"both": slice(None), "second": slice(1, None)}
    found = _attention.time_ours(work, parts, sizes, "token_major", ("triton", "reference"), 0.01)
    assert [list(outcomes) for outcomes in found.values()] == [list(parts)] * 2
    # Triton has no kernels for a CPU. The other one still reads the cache, and closing it raises nothing.
    triton, reference = (outcomes["second"] for outcomes in found.values())
    assert triton.timing is None
    assert triton.error
    assert reference.timing is not None
    assert reference.layers == 2


def test_alternatives_that_are_missing_or_too_large_say_so():
    def missing():
        raise ModuleNotFoundError("No module named 'fast|attention'\nmore")

    message = "ModuleNotFoundError: No module named 'fast/attention'"
    assert _attention.attempt(missing) == _attention.Outcome(None, error=message)
    sizes = _attention.SIZES["llama-3-8b"]
    [padded] = [work for work in decode.works("llama-3-8b") if work.name == "131072 beside 63x1024"]
    outcome = _attention.attempt(lambda: _alternatives.cudnn(padded, sizes, 0.01))
    message = "BenchmarkError: K and V padded to the longest request take 32 GiB a layer"
    assert outcome == _attention.Outcome(None, error=message)


def test_alternatives_compute_the_same_attention_as_ours():
    """In decode with different lengths and in a causal prefill, by XLA in the place of cuDNN."""
    random = np.random.default_rng(0)
    queries, keys, values = (
        jnp.asarray(random.standard_normal((2, tokens, heads, 16)), jnp.float32)
        for tokens, heads in ((1, 4), (24, 2), (24, 2))
    )
    kv_lens = [24, 9]
    run = functools.partial(_alternatives.dot_product_attention, implementation="xla")
    lengths = (jnp.ones(2, jnp.int32), jnp.asarray(kv_lens, jnp.int32))
    [decoded] = run([queries], [keys], [values], lengths, causal=False)
    prompts = jnp.repeat(keys, 2, axis=2)
    [prefilled] = run([prompts], [keys], [values], None, causal=True)

    spec = KVCacheSpec(1, 2, 16, num_slots=2, max_seq_len=24, dtype=jnp.float32, page_bytes=4096)
    cache = plain_cache(spec, {slot: np.stack([keys[slot], values[slot]], 1)[:, None] for slot in range(2)})
    decode_work = _attention.Work("", (1, 1), tuple(kv_lens))
    [[ours], _] = _attention.attend(
        [queries[:, 0]], cache, decode_work.batch([0, 1]), layers=[0], implementation="reference"
    )
    np.testing.assert_allclose(ours, decoded[:, 0], atol=1e-5)
    prompt_work = _attention.Work.uniform("", 2, 24, 24)
    [[ours], _] = _attention.attend(
        [prompts.reshape(48, 4, 16)], cache, prompt_work.batch([0, 1]), layers=[0], implementation="reference"
    )
    np.testing.assert_allclose(ours, prefilled.reshape(48, 4, 16), atol=1e-5)


def timed(*seconds):
    return [Outcome(None, error="it does not fit") if each is None else Outcome(Timing((each,))) for each in seconds]


def test_tune_writes_the_fastest_where_it_is_faster_than_noise(tmp_path):
    path = tmp_path / "tilings.json"
    key = {"kernel": "mosaic_decode", "kv_dtype": "bfloat16", "gpu": "this", "layout": "token_major"}
    old = key | {"head_dim": 64, "tiling": {"stages": 3}}
    of_all = {name: old[name] for name in old if name not in ("gpu", "layout")}
    path.write_text(json.dumps({"comment": "what for", "rows": [old, old | {"head_dim": 96}, of_all]}))

    def rows(head_dim, *found):
        return [key | {"head_dim": head_dim} | row for row in tune.compared(found)]

    default, other, third = {"stages": 2}, {"stages": 3}, {"stages": 4}
    clear = rows(64, (default, timed(2.0, 2.0)), (other, timed(1.0, 2.0)), (third, timed(0.1, None)))
    assert [row["time"] for row in clear] == [pytest.approx(0.5**0.5), 1.0, None]
    assert clear[2]["note"] == "it does not fit"
    noise = rows(128, (default, timed(1.0)), (other, timed(0.995)))
    nothing = rows(96, (default, timed(None)), (other, timed(1.0)))
    tune.write(path, clear + noise + nothing, "today")
    assert of_all in json.loads(path.read_text())["rows"], "what is for all GPUs and layouts stays"
    written = {row["head_dim"]: row for row in json.loads(path.read_text())["rows"] if "gpu" in row}
    assert written[64]["tiling"] == other
    assert (written[64]["time"], written[64]["measured"]) == (0.707, "today")
    assert written[128]["tiling"] == default
    assert written[96] == old | {"head_dim": 96}, "what was not timed keeps its row"


def test_what_is_tuned_is_what_the_kernels_have():
    for name, kernel in tune.KERNELS.items():
        for head_dim, kv_dtype in itertools.product(kernel.head_dims, kernel.kv_dtypes):
            default = kernel.default(head_dim, kv_dtype)
            candidates = list(kernel.candidates(default))
            assert all(dataclasses.replace(default, **fields) for fields in candidates)
            assert dataclasses.replace(default, **candidates[0]) == default
            assert len({json.dumps(fields) for fields in candidates}) == len(candidates)
            columns = [fields for fields in candidates if fields.get("keys_as_rows")]
            assert bool(columns) == (name == "mosaic_decode"), "for float8, too"
            assert all(fields.get("together", 1) == 1 for fields in columns), "one that is the same as another"
            changes = [sum(fields[name] != candidates[0][name] for name in fields) for fields in candidates]
            assert changes == sorted(changes), "a run whose time is short has tried what is next to the defaults"
        assert set(kernel.works) <= {work.name for work in tune._WORKS.values()}, name


@pytest.mark.parametrize(("work", "cluster"), [("1x8192", 2), ("4x4096", 2), ("512 at 4096", 1)])
def test_a_prefill_is_tuned_in_the_clusters_that_it_runs_in(work, cluster, monkeypatch):
    kernel, taken = tune.KERNELS["mosaic_prefill"], []

    def seen(tiling, default, *_, **__):
        taken.append(default if tiling is None else tiling)
        raise NotImplementedError

    monkeypatch.setattr(mosaic_prefill, "tiling_of", seen)
    measured = tune._WORKS[work]
    queries = jax.ShapeDtypeStruct((measured.num_queries, 32, 128), jnp.bfloat16)
    batch = measured.batch(range(len(measured.q_lens)))
    with pytest.raises(NotImplementedError):
        mosaic_prefill.run(queries, None, None, batch, None, scale=1.0)
    cache = types.SimpleNamespace(order=None, layer_view=lambda _: None)
    with pytest.raises(NotImplementedError):
        tune._reader(kernel, kernel.default(128, "bfloat16"))(measured)([queries], cache, batch, layers=[0])
    assert taken == [mosaic_prefill.Tiling(cluster=cluster)] * 2


def test_tune_does_not_try_again_what_did_not_run(monkeypatch):
    tried = {}

    def time_ours(work, *_, also, **__):
        tried[work.name] = list(also)
        return {name: {"": timed(None if '"stages": 3' in name else 1.0)[0]} for name in also}

    monkeypatch.setattr(_attention, "time_ours", time_ours)
    kernel, sizes = tune.KERNELS["mosaic_decode"], _attention.SIZES["llama-3-8b"]
    found = tune._measured(kernel, sizes, "bfloat16", "token_major", 0.1, _attention.Limit(None))
    first, *others = (tried[work] for work in kernel.works)
    assert len(first) == len(found)
    for names in others:
        assert set(names) == {name for name in first if '"stages": 2' in name}
        assert len(names) < len(first)
    for fields, outcomes in found:
        error = "it does not fit" if fields["stages"] == 3 else ""
        assert [each.error for each in outcomes] == [error] * len(kernel.works)


def test_tilings_that_are_shipped(monkeypatch):
    rows = tilings._rows()
    assert len({tune._key(row) for row in rows}) == len(rows)
    for row in rows:
        default = tune.KERNELS[row["kernel"]].default(row["head_dim"], row["kv_dtype"])
        monkeypatch.setattr(target, "kind", lambda row=row: row.get("gpu", "another"))
        found = tuned(default, row["kernel"], layer_view(row["head_dim"], row["kv_dtype"], row.get("layout")))
        assert dataclasses.asdict(found) == dataclasses.asdict(default) | row["tiling"]
    assert tuned(decode_shape.Tiling(), "mosaic_decode", layer_view(72, "bfloat16")) == decode_shape.Tiling()


def layer_view(head_dim, dtype, layout=None):
    """What `tuned` looks at; of no layout that a row may be of, if none is given."""
    return types.SimpleNamespace(k=jnp.zeros(0, dtype), head_dim=head_dim, layout=layout)


def test_a_tiling_of_this_gpu_and_layout_goes_before_others(monkeypatch):
    def row(stages, **of):
        return {"kernel": "a", "head_dim": 64, "kv_dtype": "bfloat16", "tiling": {"stages": stages}} | of

    rows = [row(3), row(4, gpu="this"), row(5, layout="token_major"), row(6, gpu="this", layout="layer_major")]
    monkeypatch.setattr(tilings, "_rows", lambda: rows)

    def stages(gpu, layout, head_dim=64, dtype="bfloat16"):
        monkeypatch.setattr(target, "kind", lambda: gpu)
        return tuned(decode_shape.Tiling(), "a", layer_view(head_dim, dtype, layout)).stages

    assert (stages("this", "layer_major"), stages("this", "token_major")) == (6, 4)
    assert (stages("another", "layer_major"), stages("another", "token_major")) == (3, 5)
    assert stages("this", "layer_major", head_dim=96) == stages("", "layer_major", dtype="float16") == 2


def test_a_run_that_is_told_to_stop_reports_what_it_has(tmp_path, monkeypatch):
    def say(work, name, outcome):
        del work, name, outcome
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(_attention, "say", say)
    path = tmp_path / "decode.json"
    options = ["decode", "--shapes", "tiny", "--implementations", "reference", "--layouts", "token_major", "--quick"]
    assert command.main([*options, "--against", "--json", str(path)]) == 0
    rows = Report.read(path).tables[-1].rows
    assert rows[0]["us"] > 0
    assert {row["note"] for row in rows[1:]} == {"not run: told to stop"}
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_limit_leaves_rows_out_and_says_so(tmp_path):
    path = tmp_path / "mixed.json"
    options = ["mixed", "--shapes", "tiny", "--implementations", "reference", "--layouts", "token_major"]
    assert command.main([*options, "--limit", "0", "--json", str(path)]) == 0
    [table] = Report.read(path).tables
    assert [row["note"] for row in table.rows] == ["not run: more than --limit 0 seconds had passed"] * 2
    assert all("mixed_us" not in row for row in table.rows)
