"""What the processes of a job are started with, so that none waits for another."""

import os
import subprocess
import sys

from shardkit.cluster.jax_job import environment_for_jax

FLAG = "--xla_gpu_shard_autotuning"


def test_where_there_are_gpus_no_process_waits_for_kernels_that_others_time():
    found = environment_for_jax({"A": "1"}, drivers=("/none", "/"))
    assert found == {"A": "1", "XLA_FLAGS": f"{FLAG}=false"}


def test_where_there_are_none_nothing_is_added():
    assert environment_for_jax({"A": "1"}, drivers=("/none",)) == {"A": "1"}


def test_what_the_user_has_set_stays():
    env = {"XLA_FLAGS": f"--xla_a=1 {FLAG}=true"}
    assert environment_for_jax(env, drivers=("/",)) == env


def test_this_jaxlib_knows_the_flag():
    # One that it does not know ends a process.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{FLAG}=false"}
    code = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, timeout=120
    )
    assert done.stdout.strip() == b"2", done.stderr.decode()[-2000:]


def test_a_file_of_flags_stays_a_file():
    env = {"XLA_FLAGS": "/etc/xla.flags"}
    assert environment_for_jax(env, drivers=("/",)) == env
