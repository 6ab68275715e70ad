"""A model on emulated devices, its parameters cut as rules say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardkit.annotations import strip
from shardkit.hlo import find_collectives
from shardkit.model import call_loss
from shardkit.model_state import split_variables


class Placed:
    """A model on `size` devices, its parameters cut as rules say."""

    def __init__(self, model, microbatch, found, size):
        self._model, self._found = model, found
        mesh = Mesh(np.array(jax.devices()[:size]), ("tensor",))
        self._whole = NamedSharding(mesh, PartitionSpec())
        made = strip(jax.eval_shape(model.init, jax.random.key(0)))
        params, state = jax.tree.map(_drawn, split_variables(made))
        rest = (state, microbatch, jax.random.key(3))
        leaves, treedef = jax.tree.flatten(params)
        self._shardings = treedef.unflatten(
            NamedSharding(mesh, spec) for spec in map(_spec, found.leaves)
        )
        self._single = (params, *rest)
        self._cut = (
            jax.device_put(params, self._shardings),
            *jax.device_put(rest, self._whole),
        )
        assert len(leaves) == len(found.leaves)

    def _loss(self, params, *rest):
        return call_loss(self._model.loss, params, *rest)

    def forward(self):
        """Returns the program's text, and its results beside a single device's."""
        compiled = _compile(self._loss, self._cut, self._whole)
        expected = _compile(self._loss, self._single)(*self._single)
        return compiled.as_text(), compiled(*self._cut), expected

    def gradient(self):
        """Returns gradients, and those of a single device."""

        def gradient(params, *rest):
            return jax.grad(lambda p: self._loss(p, *rest)[0].loss_sum)(params)

        compiled = _compile(gradient, self._cut, self._shardings)
        return compiled(*self._cut), _compile(gradient, self._single)(*self._single)


def _drawn(x):
    """Small numbers, without the program that an `init` is."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros(x.shape, x.dtype)
    rng = np.random.default_rng(x.size)
    return jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype)


def _compile(fn, args, shardings=None):
    # What is compared are collectives and results, not how fast they come.
    program = jax.jit(fn, out_shardings=shardings).lower(*args)
    return program.compile({"xla_backend_optimization_level": 0})


def _spec(leaf):
    return PartitionSpec(
        *("tensor" if i == leaf.dim else None for i in range(len(leaf.shape)))
    )


def collectives(text):
    """Collectives of a program by kind: how many, and bytes.

    XLA puts independent ones into one call, whose parts are counted here.
    """
    every = [line for line in text.splitlines() for _ in range(_num_parts(line))]
    counts = {x.kind: x.count for x in find_collectives("\n".join(every))}
    return {x.kind: (counts[x.kind], x.num_bytes) for x in find_collectives(text)}


def _num_parts(line):
    found = re.search(r"= \(.*\) all-reduce\((.*?)\)", line)
    return found.group(1).count("%") if found else 1


def predicted(found, size):
    """The same as rules predict it."""
    total = {}
    for x in found.exchanges:
        factor = size if x.kind == "all-gather" else 1
        count, num_bytes = total.get(x.kind, (0, 0))
        total[x.kind] = count + x.count, num_bytes + factor * x.num_bytes
    return total


def assert_alike(found, expected):
    """Equal to float32 rounding, beside the largest of all elements."""
    pairs = list(zip(*map(jax.tree.leaves, (found, expected)), strict=True))
    largest = max(float(np.abs(np.asarray(b)).max(initial=0)) for _, b in pairs)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * max(largest, 1))
