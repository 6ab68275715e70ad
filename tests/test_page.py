"""The report of a run: what it says, and of which runs."""

import json
import math
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reported import CHANGE, Metrics, emit_change, open_run
from stored_runs import (
    bits,
    loss_of,
    step_line,
    store_run,
    write_lines,
)

from shardkit.cluster.kept_recoveries import keep_recoveries
from shardkit.errors import ConfigError
from shardkit.events import EventLog
from shardkit.layout import Layout, LeafLayout
from shardkit.mesh import MeshSpec, device_ids, mesh_sizes
from shardkit.places import Places
from shardkit.report import Report
from shardkit.report.charts import Scale, ticks
from shardkit.report.layout_file import Leaf, parse_layout, pieces_of, write_layout
from shardkit.report.page import render_page
from shardkit.report.page_data import page_data
from shardkit.report.stored_run import StoredRun
from shardkit.report.thin import MAX_POINTS, smoothed, thin


def read(path, **options):
    return page_data(StoredRun.read(store_run(path, **options)))


def test_the_numbers_are_those_of_the_run(tmp_path):
    data = read(tmp_path / "run")
    assert data.losses == [(step, loss_of(step)) for step in range(20)]
    assert data.evals == [(5, 2.0), (10, 1.5)]
    assert data.step_ms[:3] == [(0, None), (1, 20.0), (2, 30.0)]
    # A mean weighs as many as it has microbatches, so rows are counted.
    assert data.rate_unit == "examples"
    assert data.rates[1] == (1, 8 / 0.02)
    assert data.num_devices == [(0, 8), (5, 3)]
    facts = {name: (value, more) for name, value, more in data.facts}
    assert facts["steps"] == ("20", "of 20")
    assert facts["final loss"] == (f"{loss_of(19):.4f}", f"bits {bits(loss_of(19))}")
    assert facts["validation loss"] == ("1.5000", "before step 10")
    assert facts["devices"] == ("3 to 8", "at last fsdp=3")
    assert facts["changes of devices"] == ("1", "1 certified")
    assert data.state == "finished"
    assert [(m.step, m.kind) for m in data.marks] == [
        (0, "start"),
        (5, "change"),
        (10, "checkpoint"),
    ]
    [timeline] = data.timelines
    names = [name for name, _, _ in timeline.phases]
    assert names == [*(p["name"] for p in CHANGE["phases"]), "first_step"]
    assert timeline.end_s == 0.4
    [(is_proven, words)] = data.certificates
    assert is_proven
    assert "data=2 fsdp=4 and on fsdp=3" in words
    assert "3 leaves" in words


@pytest.mark.parametrize(
    ("certified", "expected"), [(False, "bits differ"), (None, "nothing is proven")]
)
def test_what_was_not_proven_is_not_called_so(tmp_path, certified, expected):
    path = store_run(tmp_path / "run")
    text = (path / "metrics.jsonl").read_text()
    words = '"certified": true', f'"certified": {json.dumps(certified)}'
    (path / "metrics.jsonl").write_text(text.replace(*words))
    [(is_proven, words)] = page_data(StoredRun.read(path)).certificates
    assert is_proven is certified
    assert expected in words


def test_what_a_run_of_another_kind_lacks_is_left_out(tmp_path):
    path = store_run(tmp_path / "run", is_finished=False, leaves=None, steps=12)
    (path / "events.jsonl").unlink()
    run = StoredRun.read(path)
    data = page_data(run)
    assert data.state == "12 of 20 steps"
    assert data.leaves is None
    assert [stay.is_recorded for stay in run.stays()] == [False, False]
    assert "not recorded" in render_page(data)
    for name in ("metrics.jsonl", "events.jsonl"):
        write_lines(path / name, [])
    assert "no step yet" in render_page(page_data(StoredRun.read(path)))


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path):
    lines = [step_line(step) for step in range(9)]
    lines[4] |= {"loss": None, "loss_bits": "7fc00000"}
    data = read(tmp_path / "run", lines=lines)
    assert data.losses[4] == (4, None)
    page = render_page(data)
    assert "not finite: 1" in page
    assert not re.search(r"NaN|Infinity", page)


def test_recoveries_are_kept_with_the_run_and_shown(tmp_path):
    path = store_run(tmp_path / "run")
    phases = [{"name": "detect", "s": 0.5}, {"name": "form", "s": 1.0}]
    one = {"cause": "host-1 was lost", "step": 7, "phases": phases, "is_over": True}
    keep_recoveries(str(path), [{**one, "started_s": 10.0}], begun_unix_s=5.0)
    # Another launch of the same run; one recovery of it is under way.
    later = [{**one, "started_s": 30.0}, {**one, "started_s": 40.0, "is_over": False}]
    keep_recoveries(str(path), later, begun_unix_s=20.0)
    run = StoredRun.read(path)
    assert [r["started_s"] for r in run.recoveries] == [10.0, 30.0]
    data = page_data(run)
    assert data.timelines[-1].phases == [("detect", 0, 0.5), ("form", 0.5, 1.5)]
    assert ("recoveries", "2", "3.00 s") in data.facts
    # The run is elsewhere.
    keep_recoveries(str(tmp_path / "none"), later, begun_unix_s=0.0)
    keep_recoveries(None, later, begun_unix_s=0.0)
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def test_a_report_keeps_what_the_page_needs(tmp_path, terminal):
    directory, log = open_run(tmp_path / "run"), EventLog()
    leaf = LeafLayout("w", (5, 4), np.dtype("float32"), 0, ("embed", None))
    with Report(directory, terminal, extras=False) as report:
        log.subscribe(report.event)
        log.emit("notice", message="before it has begun")
        report.begin(0, source=tmp_path / "other")
        report.describe([leaf], corpus_digest="cd")
        for step in range(8):
            ids = (0, 1, 2) if step < 5 else (2, 0, 1)
            if step == CHANGE["step"]:
                emit_change(log)
            report.step(PlacedMetrics(step, device_ids=ids))
        log.emit("checkpoint", step=8)
    log.emit("notice", message="from a thread that outlives it")
    run = StoredRun.read(directory.path)
    assert run.leaves == [
        Leaf("w", (5, 4), "float32", (("fsdp",), ()), ("embed", None))
    ]
    assert run.corpus_digest == "cd"
    [facts] = run.environments
    assert facts["platform"] == jax.default_backend()
    assert facts["versions"]["jax"] == jax.__version__
    told = [(e["event"], e["step"]) for e in run.events]
    assert told == [
        ("notice", 0),
        ("begin", 0),
        ("environment", 0),
        ("mesh", 0),
        ("reconfigure", 5),
        ("mesh", 5),
        ("checkpoint", 8),
    ]
    assert next(run.happened("begin"))["source"] == str(tmp_path / "other")


class PlacedMetrics(Metrics):
    def __init__(self, step, device_ids):
        super().__init__(step)
        object.__setattr__(self, "device_ids", device_ids)


MESHES = [
    MeshSpec(data=-1, fsdp=2),
    MeshSpec(data=1, fsdp=-1),
    MeshSpec(data=-1, fsdp=1),
]


@pytest.mark.parametrize("spec", MESHES)
@pytest.mark.parametrize("num_devices", [1, 6, 8])
@pytest.mark.parametrize(("shape", "dim"), [((5, 4), 0), ((3, 5), 1), ((7,), -1)])
def test_the_boxes_are_those_of_the_layout(devices, spec, num_devices, shape, dim):
    mesh = spec.build(list(reversed(devices[:num_devices])))
    leaf = LeafLayout("w", shape, np.dtype("float32"), dim)
    layout = Layout.of_leaf(leaf, Places.of_mesh(mesh))
    cuts = tuple(("fsdp",) if d == dim else () for d in range(len(shape)))
    stored = Leaf("w", shape, "float32", cuts)
    found = {}
    for piece in pieces_of(stored, mesh_sizes(mesh), device_ids(mesh)):
        assert piece.shape == layout.piece_shape
        found |= dict.fromkeys(piece.device_ids, piece.box)
    assert found == {device.id: layout.box(device.id) for device in mesh.devices.flat}


@pytest.mark.parametrize("spec", [MeshSpec(tensor=2), MeshSpec(tensor=3, expert=2)])
def test_boxes_of_groups_are_those_of_the_layout_too(devices, spec, tmp_path):
    mesh = spec.build(devices)
    group = ("tensor", 1), ("expert", 0)
    leaves = [
        LeafLayout("dim 0 by fsdp", (5, 6), np.dtype("float32"), 0, group=group[:1]),
        LeafLayout("by a group alone", (4, 6), np.dtype("float32"), group=group),
        LeafLayout("not divided", (3, 5), np.dtype("float32"), 0, group=group[:1]),
    ]
    write_layout(tmp_path / "layout.json", leaves)
    stored = parse_layout(json.loads((tmp_path / "layout.json").read_text()))
    for leaf, told in zip(leaves, stored, strict=True):
        layout = Layout.of_leaf(leaf, Places.of_mesh(mesh))
        found = {}
        for piece in pieces_of(told, mesh_sizes(mesh), device_ids(mesh)):
            assert piece.shape == layout.piece_shape, leaf.path
            found |= dict.fromkeys(piece.device_ids, piece.box)
        assert found == {d.id: layout.box(d.id) for d in mesh.devices.flat}, leaf.path


def test_a_layout_is_read_as_it_was_written(tmp_path):
    leaves = [LeafLayout("a", (3, 4), np.dtype("int8"), 1), LeafLayout("b", (), float)]
    write_layout(tmp_path / "layout.json", leaves)
    first, second = parse_layout(json.loads((tmp_path / "layout.json").read_text()))
    assert first == Leaf("a", (3, 4), "int8", ((), ("fsdp",)))
    assert (second.path, second.shape) == ("b", ())


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.none() | st.floats(-9, 9), min_size=1, max_size=400))
def test_a_thinned_curve_keeps_its_extremes(values):
    points = list(enumerate(values))
    found = thin(points, most=50)
    assert len(found) <= 50
    assert set(found) <= set(points)
    assert (found[0], found[-1]) == (points[0], points[-1])
    known, kept = ([y for _, y in part if y is not None] for part in (points, found))
    if known:
        assert (min(kept), max(kept)) == (min(known), max(known))
        line = smoothed(points)
        assert all(min(known) - 1e-9 <= y <= max(known) + 1e-9 for _, y in line)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.floats(-1e30, 1e30), st.floats(1e-6, 1e30), st.integers(1, 12))
def test_ticks_are_few_and_in_range(low, size, count):
    scale = Scale(low, low + size)
    found = ticks(scale, count)
    assert len(found) <= 3 * count + 2
    assert all(low - size * 1e-3 <= t <= low + size * 1.001 for t in found)


def test_a_long_run_has_a_small_page(tmp_path):
    num = 100_000
    lines = [step_line(step, loss=1 + math.sin(step)) for step in range(num)]
    lines[4321] = step_line(4321, loss=50.0)
    data = read(tmp_path / "run", lines=lines, steps=num)
    assert len(data.losses) <= MAX_POINTS
    assert (4321, 50.0) in data.losses
    assert len(render_page(data).encode()) < 1_000_000


DAMAGE = {
    "metrics.jsonl": ('{"step": 3, "lo\n', "line 6 is damaged: not JSON"),
    "events.jsonl": ('{"event": 3, "step": 1}\n', "line 6 is damaged: event is 3"),
    "summary.json": ("{", "damaged: not JSON"),
    "layout.json": ('{"leaves": [{"path": "w"}]}', "leaf 0 lacks 'dtype'"),
    "recoveries.json": ("{}", "expected a list"),
    "config.toml": ("[train", "not TOML"),
}


def damage(path, name):
    file, (text, _) = path / name, DAMAGE[name]
    if name.endswith(".jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        text = "".join([*lines[:5], text, *lines[5:]])
    file.write_text(text)


def test_everything_that_is_damaged_is_told_at_once(tmp_path):
    path = store_run(tmp_path / "run")
    for name in DAMAGE:
        damage(path, name)
    with pytest.raises(ConfigError) as caught:
        StoredRun.read(path)
    for name, (_, words) in DAMAGE.items():
        assert re.search(
            rf"{re.escape(str(path / name))}:.*{re.escape(words)}", str(caught.value)
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_bits": "xyz"},
        {"metrics": [1.0]},
        {"metrics": {"grad_norm": "1"}},
        {"loss": "2.0"},
        {"mesh": {"fsdp": 0}},
        {"num_devices": True},
        {"step": "7"},
    ],
)
def test_a_record_of_other_types_is_refused(tmp_path, fields):
    lines = [step_line(step) for step in range(9)]
    lines[7] |= fields
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 10"):
        StoredRun.read(store_run(tmp_path / "run", lines=lines))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="found nothing"):
        StoredRun.read(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="found a file"):
        StoredRun.read(tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match=r"has a config\.toml; found notes\.txt"):
        StoredRun.read(tmp_path)
