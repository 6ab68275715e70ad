"""Programs that outlive their process, and what must not be loaded."""

import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec
from test_multiprocess import finish, free_port, start

import shardkit as sk
from shardkit.program import Program
from shardkit.program_cache import use_program_cache

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_persistent_cache_enable_xla_caches",
)
X = np.arange(8, dtype=np.float32)
ALL = ["digest", "evaluate", "init", "step"]


@pytest.fixture
def cache(tmp_path):
    """A directory in use; the settings of before come back."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    assert use_program_cache(tmp_path / "cache")
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def looked(caplog):
    """Returns whether JAX has found each `curve` that it looked for since."""
    caplog.set_level(logging.DEBUG, logger="jax._src.compiler")

    def looked():
        texts = [r.getMessage() for r in caplog.records]
        caplog.clear()
        return ["cache hit" in text for text in texts if "'jit_curve' with key" in text]

    return looked


def run_curve():
    mesh = sk.MeshSpec().build(jax.devices()[:4])
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("fsdp")))
    return np.asarray(Program(lambda x: x * 3 + 1, name="curve")(x)).tobytes()


def entry_of(cache):
    [path] = cache.glob("*/jit_curve*")
    return path


def test_a_program_is_kept_for_one_user_and_loaded_again(cache, looked):
    before = os.umask(0)
    try:
        bits = run_curve()
    finally:
        os.umask(before)
    assert run_curve() == bits == (X * 3 + 1).tobytes()
    assert looked() == [False, True]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in cache.rglob("*")}
    modes[cache] = stat.S_IMODE(cache.stat().st_mode)
    assert {m for p, m in modes.items() if p.is_dir()} == {0o700}
    assert {m for p, m in modes.items() if p.is_file()} == {0o600}
    assert not list(cache.rglob(".*"))


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda _: b"", lambda _: b"x" * 999])
def test_a_damaged_program_is_compiled_again_and_replaced(
    cache, looked, caplog, damage
):
    bits = run_curve()
    path = entry_of(cache)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    caplog.clear()
    assert run_curve() == bits
    assert [r.levelname for r in caplog.records if "damaged" in r.message] == [
        "WARNING"
    ]
    assert looked() == [False]
    assert len(entry_of(cache).read_bytes()) > 32
    assert run_curve() == bits
    assert looked() == [True]


def test_a_program_that_others_could_have_written_is_not_loaded(cache, looked):
    bits = run_curve()
    entry_of(cache).chmod(0o622)
    assert run_curve() == bits
    assert looked() == [False, False]


def test_a_link_is_not_followed(cache, looked, tmp_path):
    run_curve()
    path = entry_of(cache)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    run_curve()
    assert looked() == [False, False]


def test_a_directory_that_vanishes_costs_only_compilations(cache, looked):
    bits = run_curve()
    for path in sorted(cache.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    cache.rmdir()
    cache.write_text("a file in its place")
    assert [run_curve(), run_curve()] == [bits, bits]
    assert looked() == [False, False, False]


def test_a_directory_that_others_may_write_is_refused(tmp_path):
    tmp_path.chmod(0o770)
    with pytest.raises(
        sk.ConfigError, match=r"this user alone.*mode 0770; run chmod 700"
    ):
        use_program_cache(tmp_path)


def test_the_directory_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(sk.ConfigError, match="found owner"):
        use_program_cache(tmp_path)


def test_a_directory_that_others_may_read_becomes_private(tmp_path, cache):
    directory = tmp_path / "earlier"
    directory.mkdir(mode=0o755)
    assert use_program_cache(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_directory_that_cannot_be_made_is_told(tmp_path, caplog):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").touch()
    assert not use_program_cache(tmp_path / "file" / "cache")
    assert "no compiled programs can be kept" in caplog.text
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.multiprocess
def test_the_next_process_loads_all_and_computes_the_same(tmp_path):
    first, second = [
        json.loads(*finish(start("cached", tmp_path / "cache", 8))) for _ in range(2)
    ]
    assert (first.pop("hit"), first.pop("MISS")) == ([], ALL)
    assert (second.pop("hit"), second.pop("MISS")) == (ALL, [])
    assert first == second


@pytest.mark.multiprocess
@pytest.mark.slow
def test_every_process_of_a_job_loads_its_own(tmp_path):
    found = []
    for _ in range(2):
        port = free_port()
        job = [start("cached", tmp_path / "cache", 4, port, i, 2) for i in range(2)]
        found.append([json.loads(line) for line in finish(*job)])
    for first, second in zip(*found, strict=True):
        assert (first.pop("hit"), first.pop("MISS")) == ([], ALL)
        assert (second.pop("hit"), second.pop("MISS")) == (ALL, [])
        assert first == second
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        "process-0",
        "process-1",
    }


def test_importing_it_starts_no_devices():
    code = (
        "import shardkit.program_cache; from jax._src import xla_bridge; "
        "import sys; sys.exit(xla_bridge.backends_are_initialized())"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
