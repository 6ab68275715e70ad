"""Eight emulated devices and a fixed thread pool for every test process."""

import functools
import io
import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_NPROC", "8")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def devices():
    """The pool; a test that gets fewer would prove nothing."""
    found = jax.devices()
    assert len(found) == 8
    return found


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    """Finds programs again that were compiled once, in subprocesses too."""
    from jax.experimental.compilation_cache import compilation_cache

    path = tmp_path_factory.mktemp("compiled")
    options = {
        "jax_compilation_cache_dir": str(path),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    # Whether there is a cache was settled when something was first compiled.
    compilation_cache.reset_cache()
    yield path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def make(compile_cache):
    """Makes trainers of a linear problem with their events, and closes them."""
    from problems import linear

    import shardkit as sk

    made = []

    def make(**options):
        events = []
        trainer = sk.Trainer(**{**linear(), "events": sk.EventLog(), **options})
        trainer.events.subscribe(events.append)
        made.append(trainer)
        return trainer, events

    yield make
    for trainer in made:
        trainer.close()


@pytest.fixture
def verb(capsys):
    """Runs a verb of `shardkit` in this process and returns what it printed."""
    from shardkit.command.main import main

    def run(name, *args, code=0):
        found = main([name, *map(str, args)])
        out, errors = capsys.readouterr()
        assert found == code, (out, errors)
        assert "Traceback" not in errors
        if code == 2:
            assert not out
            return errors
        return json.loads(out) if "--json" in args else out

    return lambda name: functools.partial(run, name)


@pytest.fixture
def out():
    """What a terminal has printed."""
    return io.StringIO()


@pytest.fixture
def terminal(out):
    """A terminal that is not one: plain lines."""
    from rich.console import Console

    from shardkit.report import Terminal

    return Terminal(Console(file=out, force_terminal=False))


@pytest.fixture
def segments():
    """Segments of a host of a run, gone afterwards."""
    from shardkit.snapshot.segments import Segments, reclaim

    run = os.urandom(6).hex()
    yield Segments(run, "host-0")
    reclaim(run)
