"""What the benchmarks share: shardkit's step, the clock and the table."""

import dataclasses
import platform
import statistics
import time

import jax
import numpy as np
import optax

import shardkit as sk
from benchmarks.rivals import Rival, with_jit, with_shard_map
from shardkit.events import EventLog
from shardkit.mesh_choice import FixedMesh
from shardkit.placements import Placements
from shardkit.recipe import Recipe
from shardkit.state_layout import lay_out
from shardkit.waits import Waiter

HEADER = (
    "| devices | | ms a step | / jit, median [quartiles] | / shard_map, median "
    "[quartiles] | MiB a device | / jit | / shard_map |\n" + "|---" * 8 + "|"
)
RIVALS = {"jit": with_jit, "shard_map": with_shard_map}


def describe_machine():
    device = jax.devices()[0]
    return (
        f"{len(jax.devices())} × {device.device_kind} ({device.platform}), "
        f"{platform.machine()}, Python {platform.python_version()}, "
        f"jax {jax.__version__}, optax {optax.__version__}"
    )


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def random_tokens(rows, length, vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    return {"tokens": rng.integers(0, vocab_size, (rows, length + 1), np.int32)}


class Ours:
    """One placement of shardkit, driven without the trainer's bookkeeping."""

    def __init__(
        self, model, tx, devices, batch, num_microbatches, *, exact, mesh=None, **more
    ):
        self.recipe = Recipe(
            init=model.init,
            loss=model.loss,
            tx=tx,
            num_microbatches=num_microbatches,
            exact=exact,
            **more,
        )
        self.layout, *_ = lay_out(self.recipe, model.axis_rules)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        spec = mesh or sk.MeshSpec(data=1, fsdp=-1)
        self.placement = Placements(
            self.recipe,
            self.layout,
            FixedMesh(spec),
            devices,
            abstract,
            abstract,
            EventLog(),
            Waiter(),
        ).on(len(devices))
        self._batch = batch
        self.placement.compile()
        self.compiled = self.placement.executable

    def start(self):
        """Makes the first state."""
        self._state = jax.block_until_ready(self.placement.init())

    def step(self):
        """Dispatches one step; returns its loss and weight."""
        self._state, metrics = self.placement.step(self._state, self._batch)
        return metrics["loss"], metrics["weight"]


def memory_bytes(compiled):
    """Peak bytes per device: arguments, temporaries, outputs that are not reused."""
    found = compiled.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )


def make_runners(model, devices, batch, num_microbatches):
    """Compiles and starts the rivals, fast and exact on these devices."""
    fast, exact = (
        Ours(model, optimizer(), devices, batch, num_microbatches, exact=exact)
        for exact in (False, True)
    )
    mesh = fast.placement.mesh
    runners = {
        name: Rival(gradient, fast.recipe, fast.layout, mesh, batch)
        for name, gradient in RIVALS.items()
    } | {"fast": fast, "exact": exact}
    for runner in runners.values():
        runner.start()
    return runners


def check_same_work(model, devices, batch, num_microbatches, *, num_steps=3):
    """Compares the first losses and weights of all runners, without dropout.

    Its masks differ from runner to runner, and would hide small differences.
    """
    model = dataclasses.replace(model, loss=model.eval_loss)
    runners = make_runners(model, devices, batch, num_microbatches)
    for step in range(num_steps):
        found = {name: jax.device_get(x.step()) for name, x in runners.items()}
        loss, weight = found["exact"]
        for name, other in found.items():
            if not np.isclose(other[0], loss, rtol=1e-3) or other[1] != weight:
                raise SystemExit(
                    f"{name}: other work: step {step} has loss and weight {other}, "
                    f"expected about {loss} and {weight}"
                )


def time_interleaved(runners, *, rounds, steps=1):
    """Times every runner once per round, in turn; seconds per step, by name."""
    for runner in runners.values():
        jax.block_until_ready(runner.step())
        jax.block_until_ready(runner.step())
    times = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            start_s = time.perf_counter()
            for _ in range(steps):
                found = runner.step()
            jax.block_until_ready(found)
            times[name].append((time.perf_counter() - start_s) / steps)
    return times


def ratio_row(times, name, base):
    """The median of the per-round ratios to `base`, with its quartiles."""
    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def compare(model, devices, batch, num_microbatches, *, rounds, steps=1):
    """Prints the rivals, fast and exact side by side on these devices."""
    runners = make_runners(model, devices, batch, num_microbatches)
    times = time_interleaved(runners, rounds=rounds, steps=steps)
    memory = {name: memory_bytes(runner.compiled) for name, runner in runners.items()}
    for name in runners:
        cells = [
            f"{len(devices)} | {name} | {1e3 * statistics.median(times[name]):.1f}",
            *(ratio_row(times, name, rival) for rival in RIVALS),
            f"{memory[name] / 2**20:.1f}",
            *(f"{memory[name] / memory[rival]:.2f}" for rival in RIVALS),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
