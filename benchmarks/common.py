"""What the benchmarks share: the hand-written rival, the clock and the table."""

import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.events import EventLog
from shardkit.placement import Placement
from shardkit.recipe import Recipe


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


class HandWritten:
    """Gradient accumulation as one would write it: `jit`, FSDP shardings, donation.

    The same microbatches' worth of rows per device and pass, the same optimizer, no
    determinism flag. XLA decides when to gather and to reduce.
    """

    def __init__(self, model, tx, mesh, batch, num_microbatches, dims):
        num = mesh.size
        assert num_microbatches % num == 0
        rows = NamedSharding(mesh, P(None, "fsdp"))
        spec = lambda d: P(*[None] * d, "fsdp") if d >= 0 else P()  # noqa: E731

        def first(key):
            params = jax.tree.map(
                lambda x: getattr(x, "value", x),
                model.init(key),
                is_leaf=lambda x: hasattr(x, "names"),
            )
            return params, tx.init(params)

        abstract = jax.eval_shape(first, jax.random.key(0))
        by_shape = {
            x.shape: NamedSharding(mesh, spec(d))
            for x, d in zip(jax.tree.leaves(abstract[0]), dims, strict=True)
            if d < 0 or x.shape[d] % num == 0
        }
        shardings = jax.tree.map(
            lambda x: by_shape.get(x.shape, NamedSharding(mesh, P())), abstract
        )
        self.state = jax.jit(first, out_shardings=shardings)(jax.random.key(0))
        self._tokens = jax.device_put(
            batch["tokens"].reshape(
                num_microbatches // num, -1, batch["tokens"].shape[1]
            ),
            rows,
        )

        def step(state, tokens, key):
            params, opt_state = state

            def one(carry, xs):
                sums, total = carry
                tokens, i = xs

                def loss(p):
                    out = model.loss(p, {"tokens": tokens}, jax.random.fold_in(key, i))
                    return out.loss_sum, out.weight

                (value, weight), grads = jax.value_and_grad(loss, has_aux=True)(params)
                sums = jax.tree.map(jnp.add, sums, grads)
                return (sums, total + jnp.stack([value, weight])), None

            zeros = jax.tree.map(jnp.zeros_like, params)
            index = jnp.arange(tokens.shape[0])
            (grads, total), _ = jax.lax.scan(
                one, (zeros, jnp.zeros(2)), (tokens, index)
            )
            grads = jax.tree.map(lambda g: g / total[1], grads)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), total[0]

        self._compiled = (
            jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
            .lower(self.state, self._tokens, jax.random.key(0))
            .compile()
        )
        self.memory = memory_bytes(self._compiled)

    def step(self):
        """Dispatches one step; returns its loss."""
        self.state, loss = self._compiled(self.state, self._tokens, jax.random.key(0))
        return loss


class Ours:
    """One placement of shardkit, driven without the trainer's bookkeeping."""

    def __init__(self, model, tx, mesh, batch, num_microbatches, *, exact):
        recipe = Recipe(
            init=model.init,
            loss=model.loss,
            tx=tx,
            num_microbatches=num_microbatches,
            exact=exact,
        )
        layout, _ = recipe.layout(model.axis_rules)
        self.dims = [leaf.dim for leaf in jax.tree.leaves(layout.params)]
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        self.placement = Placement(recipe, layout, mesh, abstract, EventLog())
        self.state, self._batch = self.placement.init(), batch
        self.placement.compile()
        self.memory = memory_bytes(self.placement.executable)

    def step(self):
        """Dispatches one step; returns its loss."""
        self.state, metrics = self.placement.step(self.state, self._batch)
        return metrics["loss"]


def memory_bytes(compiled):
    """Peak bytes per device: arguments, temporaries, outputs that are not reused."""
    found = compiled.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
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
                loss = runner.step()
            jax.block_until_ready(loss)
            times[name].append((time.perf_counter() - start_s) / steps)
    return times


def ratio_row(times, name, base):
    """The median of the per-round ratios to `base`, with its quartiles."""
    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def compare(model, devices, batch, num_microbatches, *, rounds, steps=1):
    """Prints rival, fast and exact side by side on these devices."""
    mesh = sk.MeshSpec(data=1, fsdp=-1).build(devices)
    tx = optimizer()
    exact = Ours(model, tx, mesh, batch, num_microbatches, exact=True)
    fast = Ours(model, tx, mesh, batch, num_microbatches, exact=False)
    plain_mesh = Mesh(np.array(devices), ("fsdp",))
    rival = HandWritten(model, tx, plain_mesh, batch, num_microbatches, exact.dims)
    runners = {"hand-written": rival, "fast": fast, "exact": exact}
    times = time_interleaved(runners, rounds=rounds, steps=steps)
    for name, runner in runners.items():
        print(
            f"| {len(devices)} | {name} | {1e3 * statistics.median(times[name]):.1f} "
            f"| {ratio_row(times, name, 'hand-written')} "
            f"| {runner.memory / 2**20:.1f} | {runner.memory / rival.memory:.2f} |",
            flush=True,
        )


HEADER = (
    "| devices | | ms a step | time ratio, median [quartiles] | MiB a device | "
    "memory ratio |\n|---|---|---|---|---|---|"
)
