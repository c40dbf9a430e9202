"""What a manager says of itself: counts, metrics for a scraper, snapshots and their pictures, its log, and its page."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import urllib.request
import weakref
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.colors
import numpy as np
import prometheus_client
import pytest
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from jax_vattention import KVCacheManager, KVCacheSpec, cli, errors, metrics, picture
from jax_vattention.manager import Snapshot
from jax_vattention.spec import KVGroup, LayerGroup
from jax_vattention.stats import CacheStats
from tests.test_manager import conserved

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/how_it_works.md", "docs/manager.md", "docs/command_line.md")
PAGE = 4096


def make(*, num_slots=8, pool_pages=200, max_seq_len=2048, layers=2, **options):
    """A token takes 128 bytes a layer: 16 tokens of two layers fill a page."""
    names = {field.name for field in dataclasses.fields(KVCacheSpec)}
    fields = {name: options.pop(name) for name in list(options) if name in names}
    spec = KVCacheSpec(layers, 1, 16, num_slots, max_seq_len, jnp.float32, PAGE, **fields)
    device = jax.devices("cpu")[0]
    return KVCacheManager(spec, pool_bytes=pool_pages * PAGE, device=device, strict=True, **options)


def mixed(**options):
    """Live, parked, retired and idle slots, spare pages, and pages of three sizes."""
    manager = make(large_page_bytes=(4 * PAGE, 16 * PAGE), **options)
    slots = [manager.allocate(600) for _ in range(6)]
    manager.finish(manager.step({slot: 40 + 70 * slot for slot in slots}))
    manager.free(slots[0])
    manager.free(slots[3])
    manager.finish(manager.step({}))
    manager.sync()
    manager.finish(manager.step({slots[1]: 150}, next_lengths={slots[1]: 300}))
    manager.step({})
    manager.free(slots[4])  # the last program may still use it
    manager.sync()
    return manager


def windows(**options):
    """Two groups, of which one has a window and has given pages back."""
    groups = (LayerGroup((0, 2), window=64), LayerGroup((1, 3)))
    manager = make(layers=4, groups=groups, **options)
    slots = [manager.allocate() for _ in range(4)]
    for seen in range(0, 400, 50):
        lengths = dict.fromkeys(slots, seen + 50)
        manager.finish(manager.step(lengths, seq_lens=dict.fromkeys(slots, seen)))
        manager.sync()
    return manager


def full(**options):
    """A pool of which nearly nothing is left."""
    manager = make(pool_pages=64, layout="layer_major", reclaim_below=0, **options)
    slots = [manager.allocate() for _ in range(4)]
    manager.finish(manager.step(dict.fromkeys(slots, 4 * 64)))
    manager.sync()
    return manager


def many(**options):
    """More slots than there is room for numbers."""
    manager = make(num_slots=300, pool_pages=3000, max_seq_len=256, **options)
    slots = [manager.allocate() for _ in range(290)]
    manager.finish(manager.step({slot: 1 + slot % 100 for slot in slots}))
    for slot in slots[::3]:
        manager.free(slot)
    return manager


MANAGERS = (mixed, windows, full, many, make)


# Counts


@pytest.mark.parametrize("build", MANAGERS)
def test_bytes_by_state_are_all_of_the_pool(build):
    with build() as manager:
        stats = conserved(manager)
        states = stats.bytes_by_state
        assert sum(states.values()) == stats.pages_total * stats.page_bytes == manager._pool.total_pages * PAGE
        assert states["mapped"] == stats.mapped_bytes
        assert (states["retired"] > 0, states["free"] < 10 * PAGE) == (build is mixed, build is full)


def test_fragmentation_is_what_cannot_be_given_as_largest_pages_at_once():
    with make(pool_pages=36, large_page_bytes=(16 * PAGE,), reclaim_below=0) as manager:
        assert manager.stats().fragmentation == pytest.approx(4 / 36)  # two large pages, and a rest of four small ones
        slot = manager.allocate()
        manager.finish(manager.step({slot: 150}))
        stats = conserved(manager)
        assert stats.pages_by_size[PAGE] == (10, 0)
        assert stats.fragmentation == pytest.approx(10 / 26)  # one large page is left of 26 free small ones
        manager.free(slot)
        manager._make_room(36, np.zeros(8, np.int32))
        stats = conserved(manager)
        assert stats.pages_by_size == {PAGE: (10, 10), 16 * PAGE: (0, 0)}
        assert stats.fragmentation == pytest.approx(20 / 36)  # ten idle ones lie in the way of the second large page
        slot = manager.allocate()
        manager.finish(manager.step({slot: 32 * 16}))  # they are released for it
        assert conserved(manager).fragmentation == 1
    with full() as manager:
        assert manager.stats().fragmentation == 0  # of one size, whatever is free can be given


def test_maps_by_cause_and_times_add_up():
    with mixed(eager_slots=1, eager_tokens=16) as manager:
        stats = conserved(manager)
        assert min(stats.maps_needed, stats.maps_ahead, stats.maps_eager) > 0
        attached = stats.pages_mapped + stats.pages_retained + stats.pages_retired
        assert stats.maps_needed + stats.maps_ahead + stats.maps_eager - stats.unmaps == attached
        assert stats.waits > 0
        assert stats.wait_seconds > 0
        assert stats.mapper_seconds > 0


# Metrics


def scrape(registry):
    """Samples by name, and their labels, of the text that a scraper gets."""
    families = list(text_string_to_metric_families(prometheus_client.generate_latest(registry).decode()))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def registered(managers):
    registry = prometheus_client.CollectorRegistry()
    collector = metrics.KVCacheCollector(managers)
    registry.register(collector)
    return registry, collector


@pytest.mark.parametrize("build", [mixed, windows])
def test_metrics_say_what_the_stats_say(build):
    with build() as manager:
        registry, _ = registered({"llama": manager})
        stats, found = manager.stats(), scrape(registry)

        def value(name, **labels):
            return found[f"jax_vattention_kv_{name}", tuple(sorted({"cache": "llama", **labels}.items()))]

        for state, count in stats.bytes_by_state.items():
            assert value("pool_bytes", state=state) == count
        slots = {"live": 3, "parked": 2, "retired": 1, "idle": 2} if build is mixed else {"live": 4, "idle": 4}
        assert {state: value("slots", state=state) for state in slots} == slots
        for cause in ("needed", "ahead", "eager"):
            assert value("mapped_bytes_total", cause=cause) == getattr(stats, f"maps_{cause}") * PAGE
        for size, (created, idle) in stats.pages_by_size.items():
            assert value("pages", page_bytes=str(size), state="idle") == idle
            assert value("pages", page_bytes=str(size), state="in_use") == created - idle
        assert value("needed_bytes") == stats.needed_bytes
        assert value("spare_bytes") == stats.pages_retained_live * PAGE
        assert value("device_bytes") == stats.pages_created * PAGE
        assert value("waste_ratio") == stats.waste
        assert value("fragmentation_ratio") == stats.fragmentation
        assert value("unmapped_bytes_total") == stats.unmaps * PAGE
        assert value("zeroed_bytes_total") == stats.zeroed_pages * PAGE
        assert max(stats.unmaps, stats.zeroed_pages) > 0
        for name in ("waits", "wait_seconds", "mapper_seconds", "reclaims", "adoptions", "background_failures"):
            assert value(f"{name}_total") == getattr(stats, name)
        assert value("tokens") == stats.tokens_live
        assert value("mapped_peak_bytes") == stats.mapped_bytes_peak
        assert value("virtual_bytes") == stats.virtual_bytes


def test_metrics_are_named_as_prometheus_wants_it():
    with mixed() as manager:
        registry, collector = registered({"llama": manager})
        described = {(family.name, family.type) for family in collector.describe()}
        families = list(collector.collect())
        assert {(family.name, family.type) for family in families} == described
        countable = {"slots", "tokens", "pages", "reclaims", "adoptions", "waits", "background_failures"}
        for family in families:
            short = family.name.removeprefix("jax_vattention_kv_")
            assert short != family.name
            assert short in countable or short.endswith(("_bytes", "_seconds", "_ratio"))
            assert family.type in ("gauge", "counter")
            assert family.documentation.endswith(".")
            for sample in family.samples:
                assert sample.name == family.name + ("_total" if family.type == "counter" else "")
        # The module's text lists them all, and the stricter format takes them too.
        listed = set(re.findall(r"^\| `(\w+)` \|", metrics.__doc__, re.MULTILINE))
        assert listed == {sample.name.removeprefix("jax_vattention_kv_") for f in families for sample in f.samples}
        text = prometheus_client.openmetrics.exposition.generate_latest(registry).decode()
        assert len(list(openmetrics_parser.text_string_to_metric_families(text))) == len(families)


def test_a_scraper_gets_all_managers_of_a_process_and_closed_ones_do_not_break_it():
    first, second = make(), mixed()
    registry, collector = registered({"first": first, "second": second})
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)

    def caches():
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as answer:
            assert answer.status == 200
            families = text_string_to_metric_families(answer.read().decode())
        return {sample.labels["cache"] for family in families for sample in family.samples}

    try:
        assert caches() == {"first", "second"}
        second.close()
        assert caches() == {"first"}
        gone = weakref.ref(first), weakref.ref(first._pool.memory), weakref.ref(first._buffers[0])
        del first  # without being closed: nothing else holds it
        gc.collect()
        assert [reference() for reference in gone] == [None] * 3
        assert caches() == set()
        third = make()
        collector.add("first", third)
        assert caches() == {"first"}
        third.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# Snapshots and pictures


@pytest.mark.parametrize("build", MANAGERS)
def test_a_snapshot_says_where_all_pages_are(build):
    with build() as manager:
        snapshot = manager.snapshot()
        stats, spec = snapshot.stats, manager.spec
        assert Snapshot.from_json(snapshot.to_json()) == snapshot
        assert sum(slot.pages_granted for slot in snapshot.slots) == stats.pages_mapped
        for slot in snapshot.slots:
            attached = granted = 0
            for group, pages in zip(spec.kv_groups, slot.groups, strict=True):
                numbers = [page for first, count, span in pages.ranges for page in range(first, first + count * span)]
                assert numbers == sorted(set(numbers))
                attached += len(numbers) * group.planes
                granted += sum(page < pages.granted for page in numbers) * group.planes
                if slot.tokens:
                    assert {pages.granted - 1, group.pages_for(slot.tokens) - 1} <= set(numbers)
            assert (attached, granted) == (slot.pages, slot.pages_granted)
        states = [slot.state for slot in snapshot.slots]
        assert (states.count("live"), states.count("parked")) == (stats.slots_live, stats.slots_parked)
        if build is mixed:
            assert set(states) == {"live", "parked", "retired"}
            assert {span for slot in snapshot.slots for _, _, span in slot.groups[0].ranges} == {1, 4, 16}
        if build is windows:
            starts = [[group.ranges[0][0] for group in slot.groups] for slot in snapshot.slots]
            assert starts == [[(350 - 64 + 1) * 256 // PAGE, 0]] * 4


@pytest.mark.parametrize("build", MANAGERS)
def test_a_picture_has_every_page_where_it_is(build):
    with build() as manager:
        snapshot = manager.snapshot()
    figure = picture.draw(snapshot)
    figure.draw_without_rendering()
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    slots, pool = figure.axes
    unit = {"KiB": 2**10, "MiB": 2**20}

    def colour(axes, x, y):
        column, line = axes.transData.transform((x, y))
        found = pixels[pixels.shape[0] - 1 - round(line), round(column)]
        return next((name for name, code in picture._COLOURS.items() if (found == rgb(code)).all()), None)

    def rgb(code):
        return np.round(np.array(matplotlib.colors.to_rgb(code)) * 255).astype(np.uint8)

    # The pool: as many pixels of a colour as that state has pages, along a line that meets no text.
    counts = snapshot.stats.bytes_by_state
    total = sum(counts.values())
    most = pool.get_xlim()[1]
    line = [colour(pool, most * (i + 0.5) / 500, 0.35) for i in range(500)]
    for state in counts:
        share = sum(name is not None and name.startswith(state) for name in line) / 500
        assert share == pytest.approx(counts[state] / total, abs=0.01)
    # The slots: the middle of every page that is no less than four pixels wide.
    scale = unit[slots.get_xlabel().split()[0]]
    pixel = (slots.get_xlim()[1] - slots.get_xlim()[0]) * scale / slots.bbox.width
    seen = set()
    for row, slot in enumerate(snapshot.slots):
        if slots.bbox.height / len(snapshot.slots) < 8:
            break
        for lane, (shape, pages) in enumerate(zip(snapshot.groups, slot.groups, strict=True)):
            size, y = PAGE * shape.planes, row + 0.5 + ((lane + 0.5) / len(snapshot.groups) - 0.5) * 0.9
            mark = slot.tokens * shape.token_bytes * shape.planes
            for first, count, span in pages.ranges:
                for page in range(first, first + count * span):
                    x = (page + 0.5) * size
                    if size < 4 * pixel or abs(x - mark) < 4 * pixel or (page - first) % span == 0 == (page + 1) % span:
                        continue
                    granted = page < pages.granted
                    expected = "mapped" if granted else picture._REST[slot.state]
                    assert colour(slots, x / scale, y) == expected, (slot, lane, page)
                    seen.add(expected)
            if pages.ranges and pages.ranges[0][0] * size > 4 * pixel:
                assert colour(slots, pages.ranges[0][0] * size / 2 / scale, y) is None  # behind the window
    if build is mixed:
        assert seen == set(picture._COLOURS) - {"free: made, idle", "free: not made"}


@pytest.mark.parametrize("build", MANAGERS)
def test_no_word_of_a_picture_is_cut_off(build):
    with build() as manager:
        figure = picture.draw(manager.snapshot())
    figure.draw_without_rendering()
    drawn = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert min(drawn.x0, drawn.y0) >= 0
    assert drawn.x1 <= width
    assert drawn.y1 <= height
    numbers = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 - 3 for upper, lower in itertools.pairwise(numbers))


def test_the_draw_command(tmp_path, capsys):
    path = tmp_path / "kv.json"
    with mixed() as manager:
        path.write_text(manager.snapshot().to_json())
    for arguments, target in (([], tmp_path / "kv.png"), (["-o", str(tmp_path / "other.png")], tmp_path / "other.png")):
        assert cli.main(["draw", str(path), *arguments]) == 0
        assert capsys.readouterr().out == f"{target}\n"
        assert target.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert matplotlib.image.imread(target).shape[1] == 1200


def test_the_draw_command_says_what_is_wrong(tmp_path, capsys):
    with mixed() as manager:
        good = json.loads(manager.snapshot().to_json())

    def changed(change):
        values = json.loads(json.dumps(good))
        change(values)
        return json.dumps(values)

    def wrong(text, message, *arguments):
        path = tmp_path / "kv.json"
        path.write_text(text)
        assert cli.main(["draw", str(path), *arguments]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("jax-vattention: error: ")
        assert captured.err.count("\n") == 1
        assert message in captured.err

    expected = "expected a snapshot as manager.snapshot().to_json() writes it: "
    wrong("", expected)
    wrong("not json", expected)
    wrong("\x00\xff", expected)
    wrong("[1, 2]", expected + "snapshot: expected an object, got '[1, 2]'")
    wrong("{}", expected + "snapshot: expected the fields stats, groups, slots, got none")
    wrong(changed(lambda v: v["stats"].pop("waits")), expected + "stats: expected the fields page_bytes,")
    wrong(changed(lambda v: v["stats"].update(waits="3")), expected + "waits: expected an integer, got '3'")
    wrong(changed(lambda v: v["stats"].update(waits=True)), expected + "waits: expected an integer")
    wrong(changed(lambda v: v["stats"].update(pages_by_size={"big": [1, 2]})), expected)
    wrong(
        changed(lambda v: v["stats"].update(pages_by_size={"4096": [1]})), expected + "pages_by_size: expected 2 values"
    )
    wrong(changed(lambda v: v["stats"].update(pages_by_size={})), expected + "pages_by_size: expected")
    wrong(changed(lambda v: v["slots"][0].update(state="gone")), expected + "slot 0: expected a state of a slot")
    wrong(changed(lambda v: v["slots"][0].update(groups=[])), expected + "slot 0: expected 1 groups, got 0")
    wrong(json.dumps(good), "No such file", "-o", str(tmp_path / "nowhere" / "kv.png"))
    (tmp_path / "kv.json").unlink()
    assert cli.main(["draw", str(tmp_path / "kv.json")]) == 1
    assert "kv.json: no such file. Write one with manager.snapshot().to_json()" in capsys.readouterr().err
    assert cli.main(["draw", str(tmp_path)]) == 1
    assert "directory" in capsys.readouterr().err


def run(code, *, errors_are_fatal=True):
    """Python in a process of its own, that has no GPU."""
    command = [sys.executable, *(["-W", "error"] if errors_are_fatal else []), "-c", code]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)


def test_extras_that_are_missing_are_named(tmp_path):
    with make() as manager:
        (tmp_path / "kv.json").write_text(manager.snapshot().to_json())
    code = f"""
        import sys
        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("matplotlib", "prometheus_client"):
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Missing())
        from jax_vattention import cli, KVCacheManager
        status = cli.main(["draw", {str(tmp_path / "kv.json")!r}])
        try:
            import jax_vattention.metrics
        except ImportError as error:
            print(error)
        sys.exit(status)
    """
    done = run(textwrap.dedent(code))
    assert done.returncode == 1
    assert "'prometheus-client', which is not installed: pip install 'jax_vattention[metrics]'" in done.stdout
    assert done.stderr.startswith(
        "jax-vattention: error: drawing needs the package 'matplotlib', which is not installed"
    )
    assert "pip install 'jax_vattention[draw]'" in done.stderr
    assert done.stderr.count("\n") == 1


# The log


def logged(caplog):
    """Reclaimed pages by slot, state and reason."""
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    found = [re.fullmatch(r"reclaiming (\d+) pages of slot (\d+), (\w+): (.+)", line).groups() for line in lines]
    return [(int(pages), int(slot), state, why) for pages, slot, state, why in found]


def test_the_log_says_what_was_reclaimed_and_why(caplog):
    caplog.set_level(logging.DEBUG, "jax_vattention.manager")
    with make(pool_pages=20, reclaim_below=0) as manager:
        slots = [manager.allocate(150), manager.allocate(90)]
        manager.finish(manager.step(dict(zip(slots, (150, 90), strict=True))))  # ten pages and six
        manager.free(slots[0])
        manager.finish(manager.step({}))
        assert logged(caplog) == []
        slot = manager.allocate(0)  # the parked one with ten pages
        other = manager.allocate()
        manager.finish(manager.step({slot: 10}))
        manager.finish(manager.step({other: 16 * 7 - 6}))
        assert logged(caplog) == [(3, slot, "live", "a step needs them")]
        assert conserved(manager).unmaps == 3
        caplog.clear()
        manager.finish(manager.step({}, next_lengths={other: 16 * 9}))
        assert logged(caplog) == [(2, slot, "live", "a live slot will need them")]
        assert conserved(manager).unmaps == 5
    caplog.clear()
    with make(pool_pages=20, reclaim_below=0.5) as manager:
        slot = manager.allocate(0)
        manager.finish(manager.step({slot: 16 * 12 - 6}))
        assert logged(caplog) == []  # it has them all
        manager.free(slot)
        manager.finish(manager.step({}))
        manager.sync()
        manager.finish(manager.step({}))
        assert logged(caplog) == [(2, slot, "parked", "few pages are free")]
        assert conserved(manager).pages_free == 10
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


def test_the_log_warns_of_background_work_that_failed(caplog):
    with make() as manager:
        slot = manager.allocate()
        manager.finish(manager.step({slot: 1}))
        manager._memory.inject_failure(0, False)
        manager.finish(manager.step({}, next_lengths={slot: 100}))
        assert conserved(manager).background_failures == 1
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert re.match(r"background work failed and is undone: map of 6 pages: ", caplog.records[0].getMessage())


def test_nothing_is_logged_where_nobody_listens(caplog):
    caplog.set_level(logging.INFO)
    with make(pool_pages=20, reclaim_below=0.5) as manager:
        slot = manager.allocate()
        manager.finish(manager.step({slot: 16 * 12}))
        manager.free(slot)
        for _ in range(3):
            manager.sync()
            manager.finish(manager.step({}))
        assert conserved(manager).reclaims > 0
    assert not caplog.records


# The pages in docs/


def test_the_code_of_the_page_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/manager.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    stats = "with KVCacheManager(spec, pool_bytes=64 << 20) as manager:\n    print(manager.stats().slots_live, lengths)"
    done = run("\n".join([*blocks, stats]))
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 {}\n", "")


def test_the_page_names_every_option_and_error_and_no_other():
    text = (ROOT / "docs/manager.md").read_text()

    def column(heading, number):
        section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        rows = [line.split("|")[number] for line in section.splitlines() if line.startswith("| ")][2:]
        return {name for row in rows for name in re.findall(r"`(\w+)`", row)}

    options = set(inspect.signature(KVCacheManager.__init__).parameters) - {"self", "spec"}
    assert column("Options", 1) == options
    own = {name for name, kind in vars(errors).items() if isinstance(kind, type)} - {"VAttentionError"}
    assert column("Errors", 1) == own | {"ValueError", "TypeError"}
    methods = {name for name, kind in vars(KVCacheManager).items() if inspect.isfunction(kind) and name[0] != "_"}
    assert column("Threads", 1) == methods


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_what_there_is(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!https?://)([^)#]*)#?[^)]*\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    known = {field.name for kind in (CacheStats, KVCacheSpec, KVGroup) for field in dataclasses.fields(kind)}
    known |= {name for kind in (CacheStats, KVCacheSpec, KVGroup, KVCacheManager) for name in dir(kind)}
    for method in (KVCacheManager.__init__, KVCacheManager.allocate, KVCacheManager.step):
        known |= set(inspect.signature(method).parameters)
    # Names that look like those of counts and sizes.
    pattern = (
        r"`((?:pages|slots|maps|mapped|needed|waits?|unmaps|reclaims|tokens|large|kv)_\w+|\w+_(?:bytes|tokens|slots))`"
    )
    for name in re.findall(pattern, text):
        assert name in known | {"mapped_lens"}, name


def test_the_drawing_is_legible_on_any_background():
    root = ElementTree.parse(ROOT / "docs/manager.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    width, height = (float(value) for value in root.get("viewBox").split()[2:])
    paper = root.find(f"{name}rect")
    # It brings its own paper, so that a dark page does not show through.
    assert paper.get("fill") == "#ffffff"
    assert float(paper.get("width")) >= width - 4
    assert float(paper.get("height")) >= height - 4
    words = {"".join(text.itertext()) for text in root.iter(f"{name}text")}
    assert {"idle", "live", "parked", "retired", "mapped", "retained", "free"} <= words
    assert "free + mapped + retained + retired == total" in words
    boxes = [
        [float(rect.get(side)) for side in ("x", "y", "width", "height")] + [rect.get("fill")]
        for rect in root.iter(f"{name}rect")
    ]

    def luminance(code):
        parts = np.array(matplotlib.colors.to_rgb(code))
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    for text in root.iter(f"{name}text"):
        x, y = float(text.get("x")), float(text.get("y"))
        assert 0 < x < width
        assert 10 < y < height
        behind = [fill for left, top, w, h, fill in boxes if left <= x <= left + w and top <= y <= top + h][-1]
        light, dark = sorted((luminance(behind), luminance(text.get("fill", root.get("fill")))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5, "".join(text.itertext())
