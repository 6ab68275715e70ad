"""What people write by hand: the steps that shardkit's is measured against.

Each does the work of shardkit's step from the same first state: the same rows in the
same microbatches, gradients accumulated in float32, the same optimizer, the state cut
along the same dims, donation, and no determinism flag.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardkit as sk
from models import gpt
from shardkit.keys import root_key

AXIS = "fsdp"
ROWS = P(None, AXIS)


class Rival:
    """A hand-written step, compiled; `start` makes the state that it runs on.

    Args:
        gradient: `(loss, mesh, parameters' specs)` → a function of parameters, tokens
            and key: the sums over the batch of gradients, and of loss and weight.
        recipe: What is computed.
        layout: How shardkit cuts the state; what does not divide stays whole here.
        mesh: The devices; their number divides that of the microbatches.
        batch: The global batch.
        whole: Whether all state is on every device.
    """

    def __init__(self, gradient, recipe, layout, mesh, batch, *, whole=False):
        assert recipe.num_microbatches % mesh.size == 0

        def place(leaf):
            spec = P() if whole or leaf.is_padded(mesh.size) else leaf.spec
            sharding = NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        state = jax.tree.map(place, (layout.step, layout.params, layout.opt_state))
        specs = jax.tree.map(lambda x: x.sharding.spec, state[1])
        sum_gradients = gradient(recipe.loss, mesh, specs)

        def step(state, tokens, key):
            index, params, opt_state = state
            key = jax.random.fold_in(key, index)
            sums, (loss, weight) = sum_gradients(params, tokens, key)
            grads = jax.tree.map(lambda g: g / weight, sums)
            updates, opt_state = recipe.tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (index + 1, params, opt_state), (loss / weight, weight)

        # One device's microbatch after the other's, for each pass over the devices.
        passes, length = recipe.num_microbatches // mesh.size, batch["tokens"].shape[1]
        self._tokens = batch["tokens"].reshape(passes, -1, length)
        self._rows, self._whole = NamedSharding(mesh, ROWS), NamedSharding(mesh, P())
        tokens = jax.ShapeDtypeStruct(
            self._tokens.shape, self._tokens.dtype, sharding=self._rows
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct((), key.dtype, sharding=self._whole)
        self._recipe = recipe
        self._shardings = jax.tree.map(lambda x: x.sharding, state)
        self.compiled = (
            jax.jit(step, donate_argnums=0, out_shardings=(self._shardings, None))
            .lower(state, tokens, key)
            .compile()
        )

    def start(self):
        """Places the batch and makes the state, of the same values as shardkit's."""

        def first(key):
            state = self._recipe.first_state(key)
            return state.step, state.params, state.opt_state

        root = root_key(self._recipe.seed)
        first = jax.jit(first, out_shardings=self._shardings)
        self._state = jax.block_until_ready(first(root))
        self._tokens = jax.device_put(self._tokens, self._rows)
        self._key = jax.device_put(jax.random.key(0), self._whole)

    def step(self):
        """Dispatches one step; returns its loss and weight."""
        self._state, found = self.compiled(self._state, self._tokens, self._key)
        return found


def with_jit(loss, mesh, specs):
    """Gathers once, in the hands of XLA, which adds over devices in every pass."""

    def sum_gradients(params, tokens, key):
        # Left alone, XLA cuts activations as the weights are, and repeats much work.
        whole = lax.with_sharding_constraint(params, NamedSharding(mesh, P()))
        return accumulate(loss, whole, tokens, key)

    return sum_gradients


def with_shard_map(loss, mesh, specs):
    """Gathers once, loops without a collective, then adds over devices once."""

    def sum_gradients(params, tokens, key):
        whole = jax.tree.map(gather, params, specs)
        sums, total = accumulate(loss, whole, tokens, key)
        return jax.tree.map(add_over_devices, sums, specs), lax.psum(total, AXIS)

    return on_devices(sum_gradients, mesh, specs)


def with_layer_gather(config, _, mesh, specs):
    """For a GPT of stacked layers: gathers each where it is used, both ways.

    The gradient of a gather adds over devices and cuts, so sums are pieces too.
    """
    # The loop over layers takes their first dim away.
    layer_specs = [P(*spec[1:]) for spec in jax.tree.leaves(specs["layers"])]
    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: LayerGatherGPT(config, layer_specs, nnx.Rngs(params=0)))
    )

    def loss(params, microbatch, key):
        whole = {
            name: x if name == "layers" else jax.tree.map(gather, x, specs[name])
            for name, x in params.items()
        }
        tokens = microbatch["tokens"]
        logits = nnx.merge(graphdef, nnx.State(whole))(tokens[:, :-1], key)
        losses = sk.nn.cross_entropy(logits, tokens[:, 1:])
        return sk.LossOutput(losses.sum(), jnp.float32(losses.size))

    def sum_gradients(params, tokens, key):
        sums, total = accumulate(loss, params, tokens, key)
        add = lambda x, spec: x if AXIS in spec else lax.psum(x, AXIS)  # noqa: E731
        return jax.tree.map(add, sums, specs), lax.psum(total, AXIS)

    return on_devices(sum_gradients, mesh, specs)


class LayerGatherGPT(gpt.GPT):
    """A GPT that is given its layers in pieces; without dropout."""

    def __init__(self, config, layer_specs, rngs):
        super().__init__(config, rngs)
        self.layer_specs = nnx.static(layer_specs)

    def _run_layers(self, x_BTD, key):
        graphdef, layers = nnx.split(self.layers)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def run(x_BTD, layer):
            pieces, treedef = jax.tree.flatten(layer)
            whole = treedef.unflatten(map(gather, pieces, self.layer_specs))
            return nnx.merge(graphdef, whole)(x_BTD, None), None

        return lax.scan(run, x_BTD, layers)[0]


def accumulate(loss, params, tokens, key):
    """Sums gradients, and loss and weight, over tokens `[passes, rows, T + 1]`."""

    def one(carry, xs):
        sums, total = carry
        rows, i = xs

        def scalar(p):
            out = loss(p, {"tokens": rows}, jax.random.fold_in(key, i))
            return out.loss_sum, out.weight

        (value, weight), grads = jax.value_and_grad(scalar, has_aux=True)(params)
        sums = jax.tree.map(jnp.add, sums, grads)
        return (sums, total + jnp.stack([value, weight])), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    xs = tokens, jnp.arange(tokens.shape[0])
    return lax.scan(one, (zeros, jnp.zeros(2)), xs)[0]


def on_devices(sum_gradients, mesh, specs):
    """Runs a sum of gradients on each device's pieces and rows, with its own key."""

    def local(params, tokens, key):
        key = jax.random.fold_in(key, lax.axis_index(AXIS))
        return sum_gradients(params, tokens, key)

    # Unchecked: checking would add the gradients of whole leaves in every pass.
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, ROWS, P()),
        out_specs=(specs, P()),
        check_vma=False,
    )


def gather(x, spec):
    """Joins the pieces of a leaf that is cut; its gradient adds and cuts again."""
    if AXIS not in spec:
        return x
    return lax.all_gather(x, AXIS, axis=spec.index(AXIS), tiled=True)


def add_over_devices(x, spec):
    """Adds a whole leaf over the devices, each keeping its piece."""
    if AXIS not in spec:
        return lax.psum(x, AXIS)
    dim = spec.index(AXIS)
    return lax.psum_scatter(x, AXIS, scatter_dimension=dim, tiled=True)
