"""A saved state of many kinds of leaves, and every way to damage what is on disk."""

import concurrent.futures
import dataclasses
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import shardkit as sk
from shardkit.checkpoint.history import open_history
from shardkit.checkpoint.manager import load
from shardkit.checkpoint.reader import open_checkpoint
from shardkit.checkpoint.sums import check_sums
from shardkit.keys import raw
from shardkit.layout import LeafLayout
from shardkit.mesh import MeshSpec
from shardkit.state_moves import from_host

DEADLINE_S = 60
RUN = {"seed": 3, "consistency": "exact", "grid": 8}


def noise(shape, dtype, seed):
    """Random bits, NaNs and infinities among them."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(size), dtype).reshape(shape)


def values(step):
    """Path → array: noise, and what real states have."""
    rng = np.random.default_rng(step)
    key = jax.random.split(jax.random.key(step), 3)
    return {
        "params/kernel": noise((64, 40), "float32", step),
        "params/table": rng.normal(size=(33, 8)).astype(ml_dtypes.bfloat16),
        "params/bias": rng.normal(size=20).astype(np.float32),
        "opt_state/mu": np.zeros((64, 40), np.float32),
        "opt_state/nu": noise((5, 3), ml_dtypes.float8_e4m3fn, step),
        "opt_state/count": np.int32(step),
        "opt_state/mask": rng.random((9, 3)) < 0.5,
        "opt_state/small": rng.integers(-8, 8, (7, 2)).astype(ml_dtypes.int4),
        "opt_state/none": np.zeros((0, 4), np.float32),
        "scale": np.float32(2.0**15 + step),
        "keys": key,
    }


def placement_on(num_devices):
    """What saving and loading need of a placement."""
    mesh = MeshSpec(data=1, fsdp=-1).build(jax.devices()[:num_devices])
    layout = {
        path: LeafLayout(path, x.shape, x.dtype, 0 if x.ndim == 2 else -1)
        for path, x in values(0).items()
    }
    return SimpleNamespace(layout=layout, mesh=mesh)


def placed(tree, placement):
    def put(x, leaf):
        is_array = isinstance(x, jax.Array)
        return x if is_array else from_host(np.asarray(x), leaf, placement.mesh)

    return {path: put(x, placement.layout[path]) for path, x in tree.items()}


def same_bits(state, truth, placement):
    """Whether a physical state is the truth, to the byte; numpy alone compares."""
    for path, leaf in placement.layout.items():
        found, wanted = (np.asarray(raw(jnp.asarray(x[path]))) for x in (state, truth))
        found = found[tuple(slice(0, size) for size in wanted.shape)]
        assert state[path].dtype == leaf.dtype
        if found.dtype != wanted.dtype or found.tobytes() != wanted.tobytes():
            return False
    return True


def history_of(directory, events=None):
    config = sk.CheckpointConfig(directory=directory, keep=None)
    log = sk.EventLog()
    if events is not None:
        log.subscribe(events.append)
    return open_history(config, RUN, rows=24, corpus_digest="c", events=log)


def write(directory, *, compress):
    """Saves steps 1 and 2."""
    placement = placement_on(8)
    config = sk.CheckpointConfig(directory=directory, keep=None, compress=compress)
    history = open_history(
        config, RUN, rows=24, corpus_digest="c", events=sk.EventLog()
    )
    for step in (1, 2):
        state = placed(values(step), placement)
        history.save(step, state, placement, metrics={"loss": 1 / step}, wait=True)
    history.close()
    return directory


def files_under(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _edited(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def _replaced(path, make):
    path.unlink()
    make(path)


@dataclasses.dataclass
class Damage:
    """Ways to damage a file; each takes its path, and a source of chance."""

    other: Path
    """Another checkpoint, of the same structure."""

    def bit(self, path, rng):
        def change(content):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)

        _edited(path, change)

    def byte(self, path, rng):
        def change(content):
            content[rng.randrange(len(content))] ^= rng.randrange(1, 256)

        _edited(path, change)

    def emptied(self, path, rng):
        os.truncate(path, 0)

    def halved(self, path, rng):
        os.truncate(path, path.stat().st_size // 2)

    def cut(self, path, rng):
        os.truncate(path, path.stat().st_size - 1)

    def zeros(self, path, rng):
        path.write_bytes(bytes(path.stat().st_size))

    def garbage(self, path, rng):
        _edited(
            path, lambda content: content.extend(rng.randbytes(rng.choice([1, 99])))
        )

    def missing(self, path, rng):
        path.unlink()

    def swapped(self, path, rng):
        root = path.parents[len(path.parts) - self.depth - 1]
        second = rng.choice([p for p in files_under(root) if p != path])
        first = path.read_bytes()
        path.write_bytes(second.read_bytes())
        second.write_bytes(first)

    def foreign(self, path, rng):
        there = files_under(self.other)
        alike = [
            p for p in there if p.name == path.name and p.parent.name in path.parts
        ]
        path.write_bytes(rng.choice(alike or there).read_bytes())

    def stray(self, path, rng):
        path.with_name("stray").write_bytes(b"stray")

    def dangling(self, path, rng):
        _replaced(path, lambda p: p.symlink_to("/nonexistent/file"))

    def loop(self, path, rng):
        _replaced(path, lambda p: p.symlink_to(p))

    def endless(self, path, rng):
        _replaced(path, lambda p: p.symlink_to("/dev/zero"))

    def linked(self, path, rng):
        source = rng.choice(files_under(self.other))
        _replaced(path, lambda p: p.symlink_to(source))

    def folder(self, path, rng):
        _replaced(path, lambda p: p.mkdir())

    def pipe(self, path, rng):
        _replaced(path, os.mkfifo)

    depth: int = 0
    """How many parts the path of the damaged checkpoint has."""


CHANGES = ("bit", "byte")
KINDS = (
    "emptied halved cut zeros garbage missing swapped foreign stray dangling loop "
    "endless linked folder pipe"
).split()


class Bench:
    """A saved run that is damaged again and again, and restored each time."""

    def __init__(self, directory, *, compress=False):
        self.clean = write(directory / "clean", compress=compress)
        self.work = directory / "work"
        self.placements = [placement_on(n) for n in (8, 3, 1)]
        self.truth = {step: values(step) for step in (1, 2)}
        self.table = Counter()
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self.files = [
            p.relative_to(self.clean / "2") for p in files_under(self.step(2))
        ]

    def step(self, step):
        return self.clean / str(step)

    def damaged(self, kind, file, rng):
        """Makes a copy in which one file of step 2 is damaged."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.clean, self.work)
        step = self.work / "2"
        damage = Damage(self.work / "1", len(step.parts))
        getattr(damage, kind)(step / file, rng)
        return step

    def within(self, action):
        """Does something within a deadline."""
        return self._pool.submit(action).result(timeout=DEADLINE_S)

    def read(self, step_dir, rng):
        """Restores one step; says how that went, and fails if a value is wrong."""
        placement = rng.choice(self.placements)

        def restore():
            return load(open_checkpoint(step_dir), placement)

        refusal, state = None, None
        try:
            state = self.within(restore)
        except sk.RestoreError as error:
            refusal = str(error)
        if refusal is not None:
            assert str(step_dir) in refusal
            assert len(refusal) < 20_000
            return "refused"
        assert same_bits(state, self.truth[2], placement), "a wrong value was loaded"
        return "harmless"

    def trial(self, kind, file, seed):
        """Damages a file, restores, and checks that checksums tell of the damage."""
        rng = random.Random(seed)
        step = self.damaged(kind, file, rng)
        found = self.read(step, rng)
        if not self._is_clean(step / "state"):
            bad = self.within(lambda: check_sums(step / "state"))
            assert bad, f"checksums say nothing of {kind} {file}"
            assert all(str(step) in text for text in bad)
        elif (step / "state").is_dir():
            assert check_sums(step / "state") == []
        self.table[kind, found] += 1
        return found

    def _is_clean(self, item):
        """Whether everything is as it was, but what is written after the checksums."""

        def content(root):
            return {
                p.relative_to(root): p.read_bytes() if is_file(p) else None
                for p in root.rglob("*")
                if (p.is_symlink() or not p.is_dir()) and p.name != "commit_success.txt"
            }

        def is_file(path):
            return path.is_file() and not path.is_symlink()

        return content(item) == content(self.step(2) / "state")

    def fallback(self, kind, file, seed):
        """Restores the newest that is whole, as a run does, and saves again."""
        rng, events = random.Random(seed), []
        self.damaged(kind, file, rng)
        placement = rng.choice(self.placements)

        def restore():
            history = history_of(self.work, events)
            try:
                history.choose(None)
                step, state = history.load(placement)
                right = same_bits(state, self.truth[step], placement)
                history.save(step + 1, state, placement, metrics={}, wait=True)
                return step, right, history.steps()
            finally:
                history.close()

        step, right, left = self.within(restore)
        assert right, "a wrong value was loaded"
        told = [event.fields["message"] for event in events if event.name == "notice"]
        if step == 1:
            assert any("step 2 cannot be restored" in text for text in told), told
        assert left == ([1, 2] if step == 1 else [1, 2, 3])
        # What took its place is whole.
        again = load(open_checkpoint(self.work / str(step + 1)), placement)
        assert same_bits(again, self.truth[step], placement)
        self.table[kind, f"went on from {step}"] += 1

    def report(self):
        outcomes = sorted({outcome for _, outcome in self.table})
        lines = [f"{'damage':>10} " + " ".join(f"{o:>18}" for o in outcomes)]
        for kind in dict.fromkeys(kind for kind, _ in self.table):
            counts = (self.table[kind, outcome] for outcome in outcomes)
            lines.append(f"{kind:>10} " + " ".join(f"{n:>18}" for n in counts))
        return "\n".join([*lines, "wrong values: 0"])
