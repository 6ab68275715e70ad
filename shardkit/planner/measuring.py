"""Times programs whose work is known.

Owns the programs that a calibration runs and the clock. Invariant: what a program does
is counted as the planner counts, by `follow`, so that what is fitted to these times is
what predictions multiply. It fits nothing. All programs run on one process's devices.

Times are those of a shared host where devices share one: all of them are busy then, and
the work of all is counted.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardkit.planner.calibration import Sample
from shardkit.planner.flow import follow
from shardkit.planner.ledger import Cut
from shardkit.program import Program

__all__ = ["Experiment", "experiments", "measure"]

_AXIS = "all"
_KINDS = ("reduce-scatter", "all-gather", "all-reduce")
_LEAST_S = 0.01
_MOST_TIMES = 1 << 16
_NUM_ROUNDS = 7
_PREPARING = 0.7
"""The part of the time in which programs are compiled; the rest is for timing them."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A program to time.

    Attributes:
        name: What it is.
        make: A number of devices → `(pass, arguments)`: what one device does, which
            returns what it takes; and for all devices what they take, `[devices, …]`.
        amounts: What a device does in one pass.
        num_devices: On how many it runs; 0 for one, or all that share a host.
        num_passes: How many are one after the other where the compiler knows it: on
            GPUs a loop whose end is not known waits for the host after each pass.
    """

    name: str
    make: Callable[[int], tuple[Callable[[Any], Any], Any]]
    amounts: dict[str, float]
    num_devices: int = 0
    num_passes: int = 8


def measure(
    programs: Iterable[Experiment],
    devices: Sequence[Any],
    *,
    is_shared: bool,
    limit_s: float,
) -> tuple[list[Sample], list[Sample]]:
    """Times experiments in turn, so that a busy machine disturbs them alike.

    Args:
        programs: What to time, what matters most first; when time is up, the rest is
            left out.
        devices: All there are.
        is_shared: Whether they share a host's cores.
        limit_s: How long it may take; the first is timed in any case.

    Returns:
        What was done and how long it took; and what of it one device of a shared host
        did while no other was busy.
    """
    start_s = time.monotonic()

    def is_over(part: float) -> bool:
        return time.monotonic() - start_s > part * limit_s

    clocks: list[tuple[Experiment, int, _Clock]] = []
    for experiment in programs:
        if clocks and is_over(_PREPARING):
            break
        num = experiment.num_devices or (len(devices) if is_shared else 1)
        clocks.append((experiment, num, _Clock(experiment, devices[:num])))
        if is_shared and "products" in experiment.amounts:
            clocks.append((experiment, 0, _Clock(experiment, devices[:1])))
    for number in range(_NUM_ROUNDS):
        if number and is_over(1.0):
            break
        for _, _, clock in clocks:
            clock.tick()
    samples, alone = [], []
    for experiment, num, clock in clocks:
        share = max(num, 1) if is_shared else 1
        amounts = {name: share * n for name, n in experiment.amounts.items()}
        found = samples if num else alone
        found.append(Sample(experiment.name, amounts, clock.seconds))
    return samples, alone


class _Clock:
    """A compiled experiment, and how long it took."""

    def __init__(self, experiment: Experiment, devices: Sequence[Any]) -> None:
        self._mesh = Mesh(np.array(devices), (_AXIS,))
        one_pass, args = experiment.make(len(devices))
        rows = NamedSharding(self._mesh, PartitionSpec(_AXIS))
        self._args = jax.tree.map(lambda x: jax.device_put(x, rows), args)
        self._num_passes, self._found = experiment.num_passes, list[float]()

        def body(_: Array, carry: Any) -> Any:
            return lax.fori_loop(
                0, experiment.num_passes, lambda _, x: one_pass(x), carry
            )

        def run(times: Array, args: Any) -> Any:
            inside = jax.tree.map(lambda x: x[0], args)
            out = lax.fori_loop(0, times, body, inside)
            return jax.tree.map(lambda x: x[None], out)

        specs = PartitionSpec(), PartitionSpec(_AXIS)
        spread = jax.shard_map(
            run, mesh=self._mesh, in_specs=specs, out_specs=specs[1], check_vma=False
        )
        # Compiled as a step is: on GPUs exact ones have kernels of their own.
        self._times = self._put(1)
        self._run = Program(spread, name="calibrate").compile(self._times, self._args)
        self._call()
        num, seconds = 1, self._call()
        while seconds < _LEAST_S and num < _MOST_TIMES:
            num = max(2 * num, math.ceil(num * _LEAST_S / max(seconds, 1e-9)))
            self._times = self._put(num)
            seconds = self._call()
        self._num = num

    def tick(self) -> None:
        """Runs it once."""
        self._found.append(self._call() / self._num / self._num_passes)

    @property
    def seconds(self) -> float:
        """Those of one pass."""
        return statistics.median(self._found)

    def _call(self) -> float:
        start_s = time.perf_counter()
        jax.block_until_ready(self._run(self._times, self._args))
        return time.perf_counter() - start_s

    def _put(self, number: int) -> Array:
        whole = NamedSharding(self._mesh, PartitionSpec())
        return jax.block_until_ready(jax.device_put(np.int32(number), whole))


def experiments(
    platform: str, num_devices: int, dtypes: Sequence[str]
) -> Iterator[Experiment]:
    """Yields what to time, what matters most first.

    Args:
        platform: `"cpu"`, or that of an accelerator, which is given more to do.
        num_devices: How many there are.
        dtypes: In which products are measured.
    """
    small = platform == "cpu"
    counts = sorted({min(2, num_devices), num_devices} - {1}, reverse=True)
    products = (512, 256, 64) if small else (4096, 1024, 8192, 2048)
    # More than caches hold, even if only a few devices run at a time.
    streams = ((25, 8), (25, 1), (26, 8)) if small else ((28, 8), (28, 1), (29, 8))
    blocks = [(8, 1024, 1024), (8, 1024, 512), (4, 1024, 2048)]
    blocks = [(1, 128, 128), (2, 64, 256), (4, 64, 64)] if small else blocks
    modelled = dtypes[:1] if small else dtypes
    exchanged = (12, 20, 23) if small else (12, 22, 26, 28)
    families: list[list[list[Experiment]]] = [
        [[_product(size, dtype) for dtype in dtypes] for size in products],
        [[_block(*shape, dtype) for dtype in modelled] for shape in blocks],
        [[_stream(1 << size, passes)] for size, passes in streams],
        [
            [_collective(kind, 1 << size, n) for size in exchanged for n in counts]
            for kind in _KINDS
        ],
    ]
    for turn in itertools.zip_longest(*families, fillvalue=[]):
        for some in turn:
            yield from some


def _noise(*shape: int) -> np.ndarray:
    """Normal numbers, since zeros are quicker to multiply on some devices."""
    some = np.random.default_rng(0).standard_normal(1 << 16)
    return np.resize(some.astype(np.float32), shape)


def _product(size: int, dtype: str) -> Experiment:
    def make(num: int) -> Any:
        factor = _noise(num, size, size) / math.sqrt(size)
        args = jnp.asarray(_noise(num, size, size), dtype), jnp.asarray(factor, dtype)
        return lambda pair: (pair[0] @ pair[1], pair[1]), args

    amounts = {f"flops {dtype}": 2.0 * size**3, "products": 1.0}
    return Experiment(f"product {size} {dtype}", make, amounts)


def _stream(num_bytes: int, num_passes: int) -> Experiment:
    """Reads and writes a result that the program is given memory for, once in all."""

    def make(num: int) -> Any:
        return lambda x: x * 0.999 + 0.001, np.ones((num, num_bytes // 4), np.float32)

    amounts = {"bytes": 2.0 * num_bytes, "fresh": num_bytes / num_passes}
    name = f"stream {num_bytes >> 20} MiB × {num_passes}"
    return Experiment(name, make, amounts, num_passes=num_passes)


def _collective(kind: str, num_bytes: int, num_devices: int) -> Experiment:
    size = num_bytes // 4 // num_devices

    def gather(x: Array) -> Array:
        return lax.optimization_barrier(lax.all_gather(x, _AXIS, tiled=True))[:size]

    def scatter(x: Array) -> Array:
        piece = lax.psum_scatter(x, _AXIS, tiled=True)
        return lax.dynamic_update_slice(x, piece, (0,))

    passes = {
        "all-gather": (gather, size),
        "reduce-scatter": (scatter, size * num_devices),
        "all-reduce": (lambda x: lax.psum(x, _AXIS), size * num_devices),
    }

    def make(num: int) -> Any:
        one_pass, length = passes[kind]
        return one_pass, np.zeros((num, length), np.int32)

    sent = num_bytes * (num_devices - 1) / num_devices
    amounts = {
        "sent": 2 * sent if kind == "all-reduce" else sent,
        "hops": float(math.ceil(math.log2(num_devices))),
    }
    name = f"{kind} {num_bytes >> 10} KiB over {num_devices}"
    return Experiment(name, make, amounts, num_devices)


def _block(rows: int, length: int, embed: int, dtype: str) -> Experiment:
    """The gradient of two layers of a transformer, added to those before."""
    num_layers, head = 2, min(64, embed)
    shapes = {"qkv": (embed, 3 * embed), "out": (embed, embed)}
    shapes |= {"up": (embed, 4 * embed), "down": (4 * embed, embed)}

    def norm(x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-5)
        return y.astype(x.dtype)

    def layer(x: Array, w: dict[str, Array]) -> tuple[Array, None]:
        w = {name: value.astype(dtype) for name, value in w.items()}
        heads = (rows, length, 3, embed // head, head)
        q, k, v = jnp.moveaxis((norm(x) @ w["qkv"]).reshape(heads), 2, 0)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        x = x + y.reshape(x.shape) @ w["out"]
        return x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"], None

    def loss(weights: Any, x: Array) -> Array:
        y, _ = lax.scan(layer, x, weights)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    gradient = jax.grad(loss)

    def make(num: int) -> Any:
        weights = {
            name: _noise(num, num_layers, *shape) * 0.02
            for name, shape in shapes.items()
        }
        x = jnp.asarray(_noise(num, rows, length, embed), dtype)
        sums = jax.tree.map(np.zeros_like, weights)

        def one_pass(carry: Any) -> Any:
            weights, x, sums = carry
            # It depends on the sums, or it would be computed once for all passes.
            x, sums = lax.optimization_barrier((x, sums))
            found = gradient(weights, x)
            return weights, x, jax.tree.map(jnp.add, sums, found)

        return one_pass, (weights, x, sums)

    weights = {
        name: jax.ShapeDtypeStruct((num_layers, *shape), jnp.float32)
        for name, shape in shapes.items()
    }
    x = jax.ShapeDtypeStruct((rows, length, embed), jnp.dtype(dtype))
    traced = jax.make_jaxpr(gradient)(weights, x)
    _, work = follow(traced.jaxpr, [Cut.whole(a) for a in traced.in_avals])
    flops: dict[str, float] = {}
    for (name, _), amount in work.flops.items():
        flops[f"flops {name}"] = flops.get(f"flops {name}", 0.0) + amount
    num_params = sum(math.prod(w.shape) for w in weights.values())
    amounts = flops | {
        "products": float(work.num_products),
        "written": 2.0 * sum(work.other_bytes.values()),
        "bytes": 12.0 * num_params,
    }
    name = f"gradient {rows}×{length}×{embed} {dtype}"
    return Experiment(name, make, amounts, num_passes=1)
