import pytest
from reported import CHANGE

from shardkit.report.timeline import MAX_SHOWN, changes_of, write_timeline

FIRST_STEP = {"event": "first_step", "step": 5, "start_s": 0.25, "end_s": 0.5}


def change(step=5, **phases):
    """A record of a change whose phases take so many seconds."""
    record, end_s = {"event": "reconfigure", **CHANGE, "step": step}, 0.0
    if phases:
        record["phases"] = []
    for name, spent_s in phases.items():
        times = {"start_s": end_s, "end_s": end_s + spent_s}
        record["phases"].append({"name": name, "bytes": 0, **times})
        end_s += spent_s
    return record


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws changes; returns the bars of each panel by row, and all that is written."""
    figure = pytest.importorskip("matplotlib.figure")
    from matplotlib.offsetbox import AnnotationBbox, TextArea

    drawn, save = [], figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a: drawn.append(self) or save(self, *a)
    )

    def draw(records):
        path = tmp_path / "changes.png"
        write_timeline(path, records, title="run")
        assert path.read_bytes().startswith(b"\x89PNG")
        panels = [
            [(bar.get_y() + 0.15, bar.get_x(), bar.get_width()) for bar in axes.patches]
            for axes in drawn[-1].axes
        ]
        words = [
            " ".join(area.get_text() for area in box.findobj(TextArea))
            for box in drawn[-1].findobj(AnnotationBbox)
        ]
        return panels, words

    return draw


def test_the_first_step_belongs_to_the_change_of_its_step():
    lines = [{"step": 4}, change(), FIRST_STEP, {"step": 5}, change(step=7)]
    first, second = changes_of(lines)
    names = [phase["name"] for phase in first["phases"]]
    assert names == ["plan", "move", "first_step"]
    assert second["phases"] == CHANGE["phases"]
    assert changes_of([FIRST_STEP]) == []
    assert len(CHANGE["phases"]) == 2


def test_every_change_has_a_bar_with_its_phases(draw):
    [bars], words = draw([change(), FIRST_STEP, change(step=7, move=0.04)])
    # Rows from the top, in milliseconds.
    assert [tuple(map(round, bar)) for bar in bars] == [
        (0, 0, 10),
        (0, 10, 240),
        (0, 250, 250),
        (1, 0, 40),
    ]
    said = "\n".join(words)
    assert "step 5: 8 → 3" in said
    assert "250 ms, 3 MiB moved, certified" in said
    assert "plan 10 ms" in said
    assert "first step 250 ms" in said
    assert "step 7: 8 → 3" in said


def test_compiling_does_not_hide_the_rest(draw):
    panels, words = draw([change(compile=20.0, plan=0.05, move=0.15, batch=1e-5)])
    whole, rest = panels
    assert [x for _, x, _ in whole] == pytest.approx([0, 20, 20.05, 20.2])
    assert whole[0][2] == 20
    assert [x for _, x, _ in rest] == pytest.approx([0, 50, 200])
    assert [width for _, _, width in rest][:2] == pytest.approx([50, 150])
    assert len(words) == 3
    assert "batch" not in "".join(words)


def test_at_most_so_many_are_drawn_the_newest(draw):
    [bars], words = draw([change(step=step) for step in range(MAX_SHOWN + 3)])
    assert len(bars) == 2 * MAX_SHOWN
    assert not [text for text in words if text.startswith("step 2:")]
    assert [text for text in words if text.startswith("step 3:")]


def test_without_changes_there_is_no_picture(tmp_path):
    path = tmp_path / "changes.png"
    path.write_text("of a change that was cut")
    write_timeline(path, [{"step": 0}])
    assert not path.exists()
