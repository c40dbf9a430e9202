"""The benchmarks' reports and tables. Nothing here is timed."""

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
