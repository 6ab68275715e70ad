"""Snapshots that several processes take together."""

import json

import pytest
from problems import PROBLEMS
from test_multiprocess import finish, free_port, start

import shardkit as sk
from shardkit.digest import combine_digests
from shardkit.snapshot.image import read_image
from shardkit.snapshot.restore import restore
from shardkit.testing import run_digest

pytestmark = pytest.mark.multiprocess


def test_two_processes_go_on_from_their_snapshots(tmp_path):
    port = free_port()
    first, _ = finish(*[start("snapshotting", port, i, 2, tmp_path) for i in range(2)])
    found = json.loads(first)
    trainer = sk.Trainer(**PROBLEMS["linear-clip-adam-ema"]())
    run_digest(trainer, 3)
    before = trainer.state_digest()
    digest = run_digest(trainer, 4)["state"]
    rewinds = [{"step": step, "repeats": 0, "source": "snapshot"} for step in (2, 3)]
    assert found == {
        "seen": [0, 1, 2, 3],
        "state": digest,
        "certified": [True, True],
        "rewinds": rewinds,
    }
    # Of other processes' images each has read what its own devices want, no more.
    first, second = (
        json.loads((tmp_path / f"fetched-{i}.json").read_text()) for i in range(2)
    )
    assert first == [{}] * 4
    assert [list(counts) for counts in second] == [[], [], ["3-0.image"], ["2-0.image"]]
    for counts in second:
        for name, num_bytes in counts.items():
            image = read_image((tmp_path / name).read_bytes())
            assert 0 < num_bytes < sum(piece.num_bytes for piece in image.pieces) / 2
    # What two processes have kept, one makes a state of, on any mesh.
    images = [read_image(path.read_bytes()) for path in tmp_path.glob("3-*.image")]
    assert {image.layout.process for image in images} == {0, 1}
    on_five = trainer._controller.placements.on(5)
    state = restore(images, on_five.layout, on_five.mesh)
    assert combine_digests(on_five.digest(state), on_five.layout) == before
    trainer.close()
