"""Checkpoints that are written from views: the same bits, in bounded memory."""

import importlib.metadata
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import shardkit as sk
from shardkit.checkpoint.reader import open_checkpoint
from shardkit.checkpoint.store import write_checkpoint
from shardkit.checkpoint.views import ArrayView, View, whole_box
from shardkit.testing import run_digest


def random_tree(seed=0):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, (300, 70, 2), np.uint8)
    return {
        "params/a": rng.normal(size=(1000, 37)).astype(np.float32),
        "params/b": bits.view(jnp.bfloat16)[..., 0],
        "opt_state/0/count": np.array(7, np.int32),
        "empty": np.zeros((0, 3), np.float32),
        "small": rng.integers(-8, 8, 5).astype(jnp.int4),
    }


def read_all(saved):
    return {path: view.read(whole_box(view.shape)) for path, view in saved.items()}


@pytest.mark.parametrize("limit_bytes", [1 << 14, 1 << 28])
def test_what_is_written_is_read_again_and_verifies(tmp_path, limit_bytes):
    tree = random_tree()
    views = {path: ArrayView(x) for path, x in tree.items()}
    where = write_checkpoint(tmp_path, views, step=3, limit_bytes=limit_bytes)
    assert where == tmp_path / "3"
    saved = open_checkpoint(tmp_path)
    assert saved.manifest.step == 3
    assert saved.check_files() == []
    found = read_all(saved.verified().views)
    for path, x in tree.items():
        assert found[path].dtype == x.dtype
        assert found[path].tobytes() == x.tobytes()
    with pytest.raises(sk.RestoreError, match="is there already"):
        write_checkpoint(tmp_path, views, step=3)
    # Orbax alone reads it too.
    plain = ocp.PyTreeCheckpointer().restore(where / "state")
    assert (plain["params"]["a"] == tree["params/a"]).all()


def test_digests_are_those_of_a_run(make, tmp_path):
    trainer, _ = make(checkpoint=sk.CheckpointConfig(directory=tmp_path / "a"))
    run_digest(trainer, 2, {})
    trainer.save()
    saved = open_checkpoint(tmp_path / "a")
    records = saved.manifest.leaves
    write_checkpoint(tmp_path / "b", saved.views, like=saved.manifest, records=records)
    again = open_checkpoint(tmp_path / "b")
    assert again.manifest == saved.manifest
    resumed, _ = make(checkpoint=sk.CheckpointConfig(directory=tmp_path / "b"))
    assert resumed.restore() == 2
    assert run_digest(resumed, 4, {3: 3}) == run_digest(trainer, 4, {})


def test_a_view_that_cannot_be_read_is_an_error_and_leaves_nothing(tmp_path):
    class Broken(View):
        shape, dtype = (100, 100), np.dtype(np.float32)

        def read(self, box):
            raise sk.DamagedError("params/w: gone")

    with pytest.raises(sk.DamagedError, match="params/w: gone"):
        write_checkpoint(tmp_path, {"params/w": Broken()})
    with pytest.raises(sk.RestoreError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)


_MEMORY = """
import resource, sys
import numpy as np, jax
from shardkit.checkpoint.remap import Remap
from shardkit.checkpoint.remap_ops import Transpose
from shardkit.checkpoint.reader import open_checkpoint
from shardkit.checkpoint.rules import Rule
from shardkit.checkpoint.store import write_checkpoint
from shardkit.checkpoint.views import ArrayView
small = {"params/w": ArrayView(np.ones((64, 64), np.float32))}
write_checkpoint(sys.argv[2] + "/warm", small)
tree = open_checkpoint(sys.argv[1]).views
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = Remap([Rule("params/{w}", "params/{w}", Transpose(1, 0))]).apply(tree)
write_checkpoint(sys.argv[2] + "/out", made, limit_bytes=int(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_ten_times_the_limit_goes_through(tmp_path):
    limit_bytes = 32 << 20
    rng = np.random.default_rng(0)
    tree = {
        f"params/{i}": rng.normal(size=(10 << 10, 2 << 10)).astype(np.float32)
        for i in range(4)
    }
    assert sum(x.nbytes for x in tree.values()) == 10 * limit_bytes
    views = {path: ArrayView(x) for path, x in tree.items()}
    write_checkpoint(tmp_path / "in", views, limit_bytes=limit_bytes)
    arguments = [str(tmp_path / "in"), str(tmp_path), str(limit_bytes)]
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert int(done.stdout.split()[-1]) << 10 < 3 * limit_bytes
    found = read_all(open_checkpoint(tmp_path / "out").verified().views)
    for path, x in tree.items():
        assert (found[path] == x.T).all()


def test_streaming_holds_for_this_version_of_orbax():
    # What `streaming` replaces is no public part of Orbax.
    major, minor, *_ = importlib.metadata.version("orbax-checkpoint").split(".")
    assert (int(major), int(minor)) == (0, 12)
