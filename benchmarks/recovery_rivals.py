"""What recovery costs elsewhere: a restart from an Orbax checkpoint, and torchft.

    python benchmarks/recovery_rivals.py orbax [--rounds 5] [--every 1] [--plain]
    python benchmarks/recovery_rivals.py torchft --torch-python PATH [--rounds 5]

Four processes train the model of `configs/tiny.toml`; one is ended by SIGKILL at a
random point of a step. Seconds count from that signal, by the clock that all share.

`orbax` is plain JAX and Orbax: a supervisor hears of the death at once, ends the rest
and starts four new processes, which join, load the programs of the first start, restore
and go on. To be fair, two things are mended that plain JAX does badly, unless
`--plain`: it keeps programs for process 0 only, and who joins before process 0 listens
waits for gRPC's first second.

`torchft` has four replicas, data parallel over gloo, a quorum in every step. Those that
are left go on with a smaller batch; a new process takes the place of the one that died.
`--join-ms` and `--expiry-ms` may be lists, of which every pair is tried.
"""

import argparse
import functools
import itertools
import os
import platform
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.processes import (  # noqa: E402
    DEADLINE_S,
    FailedError,
    Group,
    free_port,
    repeat,
    say,
    table,
    versions,
)

NUM_PROCESSES, NUM_DEVICES, VICTIM = 4, 8, 2
STEPS_BEFORE = 8


def orbax_process(directory, programs, port, index, arguments):
    """One process of a plain run, which goes on from the newest checkpoint."""
    say("started")
    import jax
    import orbax.checkpoint as ocp

    from shardkit.put import put

    for name, value in {
        "jax_num_cpu_devices": NUM_DEVICES // NUM_PROCESSES,
        "jax_cpu_collectives_implementation": "gloo",
        "jax_compilation_cache_dir": f"{programs}/of-all",
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        jax.config.update(name, value)
    if not arguments.plain:
        jax.config.update("jax_compilation_cache_dir", f"{programs}/of-{index}")
    say("imported", jax=jax.__version__, orbax=ocp.__version__)
    if index and not arguments.plain:
        wait_for_listener(port)
    jax.distributed.initialize(f"127.0.0.1:{port}", NUM_PROCESSES, index)
    assert len(jax.devices()) == NUM_DEVICES
    if not arguments.plain:
        from jax._src import distributed

        # Only who seems to be the first keeps what it compiles.
        distributed.global_state.process_id = 0
    say("joined")
    runner = make_runner()
    say("compiled")
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=arguments.every, max_to_keep=3
    )
    with ocp.CheckpointManager(f"{directory}/steps", options=options) as manager:
        done = manager.latest_step()
        first = functools.partial(first_state, runner._recipe)
        if done is None:
            key = jax.random.key(0)
            runner._state = jax.jit(first, out_shardings=runner._shardings)(key)
        else:
            like = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                jax.eval_shape(first, jax.random.key(0)),
                runner._shardings,
            )
            runner._state = manager.restore(done, args=ocp.args.StandardRestore(like))
        runner._tokens = put(runner._tokens, runner._rows)
        runner._key = put(jax.random.key(0), runner._whole)
        jax.block_until_ready((runner._state, runner._tokens))
        say("restored", step=done or 0)
        for step in itertools.count((done or 0) + 1):
            jax.block_until_ready((runner.step(), runner._state))
            say("step", step=step)
            manager.save(step, args=ocp.args.StandardSave(runner._state))
            say("saving", step=step)


def make_runner():
    """Compiles a hand-written step; every leaf is cut where it divides, if anywhere."""
    import jax
    import numpy as np

    from benchmarks import common
    from benchmarks.rivals import AXIS, Rival, with_shard_map
    from models import gpt
    from shardkit.layout import LeafLayout
    from shardkit.recipe import Recipe

    config = tomllib.loads((ROOT / "configs" / "tiny.toml").read_text())
    model, data = gpt.build(**config["model"]["options"]), config["data"]
    recipe = Recipe(
        init=model.init,
        loss=model.loss,
        tx=common.optimizer(),
        num_microbatches=data["num_microbatches"],
        exact=False,
    )

    def cut(x):
        found = [dim for dim, size in enumerate(x.shape) if size % NUM_DEVICES == 0]
        return LeafLayout(
            path="", shape=x.shape, dtype=x.dtype, dim=found[-1] if found else -1
        )

    abstract = jax.eval_shape(recipe.first_state, jax.random.key(0))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (AXIS,))
    batch = common.random_tokens(
        data["global_batch_size"], data["sequence_length"], 256
    )
    return Rival(with_shard_map, recipe, jax.tree.map(cut, abstract), mesh, batch)


def first_state(recipe, key):
    state = recipe.first_state(key)
    return state.step, state.params, state.opt_state


def wait_for_listener(port):
    end_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < end_s:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.002)
    raise TimeoutError(f"nobody listened on port {port} for {DEADLINE_S} s")


def start_orbax(group, directory, programs, options):
    port = str(free_port())
    for index in range(NUM_PROCESSES):
        group.start(
            index,
            [
                *(sys.executable, __file__, "orbax", *options),
                *("--child", directory, programs, port, str(index)),
            ],
            JAX_PLATFORMS="cpu",
            PJRT_NPROC=str(NUM_DEVICES),
        )


def restart_from_orbax(options, programs, rng):
    """One round; seconds of each phase, and steps that were done again."""
    everybody = range(NUM_PROCESSES)
    with tempfile.TemporaryDirectory() as directory, Group() as group:
        start_orbax(group, directory, programs, options)
        warm_s, _ = group.until(
            "step", everybody, lambda e: e["step"] >= STEPS_BEFORE - 2
        )
        at_s, _ = group.until("step", everybody, lambda e: e["step"] >= STEPS_BEFORE)
        time.sleep(rng.random() * (at_s - warm_s) / 2)
        killed_s, pid = group.kill(VICTIM)
        done = STEPS_BEFORE
        for member, event in group.events(may_end=[pid]):
            if event["event"] == "step":
                done = max(done, event["step"])
            if member == VICTIM and event["event"] == "ended":
                break
        noticed_s = time.time()
        for member in range(NUM_PROCESSES):
            group.kill(member)
        for process in group.members.values():
            process.wait()
        phases = {
            "notice": noticed_s - killed_s,
            "end the rest": time.time() - noticed_s,
        }
        before_s = time.time()
        start_orbax(group, directory, programs, options)
        for name in ("imported", "joined", "compiled", "restored", "step"):
            at_s, events = group.until(name, everybody)
            phases[name], before_s = at_s - before_s, at_s
        again = done - min(e["step"] for e in events.values()) + 1
        phases["next step"] = at_s - killed_s
        if again > 0:
            at_s, _ = group.until("step", everybody, lambda e: e["step"] > done)
        phases["first new step"] = at_s - killed_s
        second_s, _ = group.until("step", everybody, lambda e: e["step"] > done + 1)
        third_s, _ = group.until("step", everybody, lambda e: e["step"] > done + 2)
        phases["ordinary step"] = third_s - second_s
        return phases | {"steps again": again}


def start_replica(group, index, arguments, lighthouse):
    group.start(
        index,
        [arguments.torch_python, str(Path(__file__).with_name("recovery_torchft.py"))]
        + ["--lighthouse", lighthouse, "--replica", str(index)]
        + ["--async-quorum"] * arguments.async_quorum,
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
    )


def replace_in_torchft(arguments, join_ms, expiry_ms, rng):
    """One round; seconds of each phase, and the steps that came to nothing."""
    port = free_port()
    lighthouse = f"http://127.0.0.1:{port}"
    command = Path(arguments.torch_python).with_name("torchft_lighthouse")
    options = {
        "--bind": f"127.0.0.1:{port}",
        "--min_replicas": 2,
        "--quorum_tick_ms": 10,
        "--join_timeout_ms": join_ms,
        "--heartbeat_timeout_ms": expiry_ms,
    }
    with Group() as group:
        text = [str(x) for pair in options.items() for x in pair]
        group.start("lighthouse", [str(command), *text], RUST_LOG="error")
        for index in range(NUM_PROCESSES):
            start_replica(group, index, arguments, lighthouse)
        full = count_steps(group, STEPS_BEFORE, NUM_PROCESSES)
        step_s = statistics.median(b - a for a, b in itertools.pairwise(full[-4:]))
        time.sleep(rng.random() * step_s)
        killed_s, _ = group.kill(VICTIM)
        rest = [i for i in range(NUM_PROCESSES) if i != VICTIM]
        start_replica(group, VICTIM, arguments, lighthouse)
        found, refused, missing, back = {}, set(), set(rest), set(range(NUM_PROCESSES))
        for member, event in group.events():
            if event["t"] < killed_s:
                continue
            if event["event"] == "refused":
                refused.add(event["step"])
            if member == VICTIM and event["event"] in ("imported", "joined"):
                found[f"new one {event['event']}"] = event["t"] - killed_s
            if event["event"] != "step":
                continue
            is_full = event["participants"] == NUM_PROCESSES
            # A step that the four of before had agreed on may still be under way.
            if not is_full or "new one joined" in found:
                missing.discard(member)
                if not missing:
                    found.setdefault("next step of the rest", event["t"] - killed_s)
            if is_full and "new one joined" in found:
                back.discard(member)
                if not back:
                    found["all four again"] = event["t"] - killed_s
                    return found | {"ordinary step": step_s, "refused": len(refused)}


def count_steps(group, number, participants):
    """Waits until all have done so many steps together; when each was done."""
    steps = {}
    for member, event in group.events():
        if event["event"] == "step" and event["participants"] == participants:
            steps.setdefault(event["step"], {})[member] = event["t"]
            done = [max(x.values()) for x in steps.values() if len(x) == participants]
            if len(done) >= number:
                return done
    raise FailedError("the replicas said nothing")


def integers(text):
    return [int(x) for x in text.split(",")]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rival", choices=["orbax", "torchft"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--torch-python", help="a Python that has torch and torchft")
    parser.add_argument("--join-ms", type=integers, default=[500])
    parser.add_argument("--expiry-ms", type=integers, default=[500])
    parser.add_argument("--async-quorum", action="store_true")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        directory, programs, port, index = arguments.child
        orbax_process(directory, programs, int(port), int(index), arguments)
    # Whoever ends this one ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rng = random.Random(arguments.seed)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {NUM_PROCESSES} processes")
    if arguments.rival == "orbax":
        names = versions(sys.executable, "jax", "orbax-checkpoint")
        options = ["--every", str(arguments.every), *["--plain"] * arguments.plain]
        with tempfile.TemporaryDirectory() as programs:
            measure = functools.partial(restart_from_orbax, options, programs, rng)
            title = f"Orbax, {' '.join(options)}; Python {names}"
            table(title, *repeat(measure, arguments.rounds))
        return
    if not arguments.torch_python:
        raise SystemExit("--torch-python: expected a Python that has torch and torchft")
    names = versions(arguments.torch_python, "torch", "torchft")
    for join_ms, expiry_ms in itertools.product(arguments.join_ms, arguments.expiry_ms):
        measure = functools.partial(
            replace_in_torchft, arguments, join_ms, expiry_ms, rng
        )
        title = f"torchft, join timeout {join_ms} ms, heartbeat timeout {expiry_ms} ms"
        table(f"{title}; Python {names}", *repeat(measure, arguments.rounds))


if __name__ == "__main__":
    main()
