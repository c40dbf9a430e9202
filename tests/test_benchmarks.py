"""The benchmarks' reports and tables, and what they count. No time is checked."""

import pytest

from benchmarks import __main__ as command
from benchmarks._report import Column, Report, Table
from benchmarks._timing import Timing, interleave


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
