import io

import numpy as np
import pytest
from reported import open_run, train
from rich.console import Console

from shardkit.report import Terminal, picture, read_records
from shardkit.report.picture import smooth, write_picture


def test_smoothing_neither_lags_nor_bends_at_the_ends():
    line = np.linspace(5, 2, 50)
    np.testing.assert_allclose(smooth(line, width=2)[6:-6], line[6:-6], rtol=1e-12)
    np.testing.assert_allclose(smooth(np.ones(4), width=3), 1, rtol=1e-12)


@pytest.mark.parametrize("num_steps", [0, 1, 40])
def test_a_picture_is_drawn(tmp_path, num_steps):
    pytest.importorskip("matplotlib")
    directory = open_run(tmp_path / "run")
    train(directory, Terminal(Console(file=io.StringIO())), num_steps)
    records = read_records(directory.metrics)
    records.append({"event": "eval", "step": 0, "loss": 2.0})
    write_picture(tmp_path / "loss.png", records, twin=records)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_says_on_which_devices_a_run_was():
    def history(*counts):
        steps = [{"step": i, "loss": 1.0, "num_devices": n} for i, n in counts]
        return picture.history(steps)

    assert history() == "no step yet"
    assert history((0, 1), (1, 1)) == "the loss on 1 device"
    assert history(*enumerate([8, 8, 6, 3, 8])) == "the loss on 8, 6, 3 and 8 devices"
    assert history(*enumerate([8, 7] * 10)) == "the loss over 19 changes of devices"
