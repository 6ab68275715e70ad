"""One small model in every framework, annotated in every way that there is for it."""

import dataclasses
import functools
from typing import Annotated, Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec

import shardkit as sk

ROWS, INPUTS, WIDTH = 26, 6, 10
RULES = {"hidden": "fsdp"}
SPEC = PartitionSpec(None, "fsdp")
CHANGES = {0: 8, 1: 5, 2: 2, 3: 8}
STEPS = 4


def _by_parts():
    """One optimizer for matrices, another for what is left, masked in part."""
    schedule = optax.linear_schedule(1e-2, 1e-3, 3)
    rest = optax.chain(
        optax.masked(
            optax.add_decayed_weights(0.1),
            lambda p: jax.tree.map(lambda x: x.ndim > 0, p),
        ),
        optax.sgd(schedule),
    )
    return optax.multi_transform(
        {"matrix": optax.inject_hyperparams(optax.adam)(schedule), "rest": rest},
        lambda params: jax.tree.map(
            lambda x: "matrix" if x.ndim == 2 else "rest", params
        ),
    )


OPTIMIZERS = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "Adam": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "factored": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "sign": lambda: optax.lion(1e-3),
    "layerwise": lambda: optax.lamb(1e-2),
    "matrix": lambda: optax.contrib.muon(1e-2),
    "by parts": _by_parts,
    "accumulating": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
}


def data(step):
    """A batch of one step."""
    x = np.random.default_rng(step).normal(size=(ROWS, INPUTS)).astype(np.float32)
    return {"x": x, "y": np.tanh(x.sum(1))}


def score(out, microbatch):
    return jnp.mean((out[:, 0] - microbatch["y"]) ** 2)


def _first(key):
    return jax.random.normal(key, (INPUTS, WIDTH)) * 0.3


def _dict(kernel):
    def init(key):
        keys = jax.random.split(key)
        return {
            "up": kernel(_first(keys[0])),
            "down": jax.random.normal(keys[1], (WIDTH, 1)),
        }

    def loss(params, microbatch, key):
        return score(
            jnp.tanh(microbatch["x"] @ params["up"]) @ params["down"], microbatch
        )

    return sk.Model(init=init, loss=loss)


@functools.cache
def _class(annotation):
    # To JAX all dataclasses of as many fields have the same structure; a cache that
    # meets two of them can return the one for the other. What is static differs.
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Net:
        up: annotation
        down: Any
        kind: str = dataclasses.field(
            default=str(annotation), metadata={"static": True}
        )

    return Net


def _dataclass(annotation, kernel=lambda x: x):
    def init(key):
        keys = jax.random.split(key)
        up, down = kernel(_first(keys[0])), jax.random.normal(keys[1], (WIDTH, 1))
        return _class(annotation)(up, down)

    def loss(net, microbatch, key):
        return score(jnp.tanh(microbatch["x"] @ net.up) @ net.down, microbatch)

    return sk.Model(init=init, loss=loss)


def _nnx(kernel_init):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(INPUTS, WIDTH, kernel_init=kernel_init, rngs=rngs)
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
            self.drop = nnx.Dropout(0.2, rngs=rngs)
            self.down = nnx.Linear(WIDTH, 1, rngs=rngs)

        def __call__(self, x):
            return self.down(self.drop(jnp.tanh(self.norm(self.up(x)))))

    return sk.from_nnx(Net, lambda net, m: score(net(m["x"]), m))


def _linen(kernel_init):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dense(WIDTH, kernel_init=kernel_init, name="up")(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.Dropout(0.2, deterministic=not train)(jnp.tanh(x))
            return nn.Dense(1)(x)

    return sk.from_linen(
        Net(),
        jax.ShapeDtypeStruct((1, INPUTS), "float32"),
        lambda apply, m: score(apply(m["x"], train=True), m),
    )


def _equinox(annotation, weight=lambda x: x):
    class Dense(eqx.Module):
        weight: annotation

        def __call__(self, x):
            return x @ self.weight

    class Net(eqx.Module):
        up: Dense
        drop: eqx.nn.Dropout
        down: eqx.nn.Linear

        def __call__(self, x, key):
            return self.down(self.drop(jnp.tanh(self.up(x)), key=key))

    def make(key):
        keys = jax.random.split(key)
        up = Dense(weight(_first(keys[0])))
        return Net(up, eqx.nn.Dropout(0.2), eqx.nn.Linear(WIDTH, 1, key=keys[1]))

    def loss(net, microbatch, key):
        keys = jax.random.split(key, len(microbatch["x"]))
        return score(jax.vmap(net)(microbatch["x"], keys), microbatch)

    return sk.from_equinox(make, loss)


def _haiku():
    def forward(x):
        x = jnp.tanh(hk.Linear(WIDTH, name="up")(x))
        return hk.Linear(1)(hk.dropout(hk.next_rng_key(), 0.2, x))

    return sk.from_haiku(
        hk.transform(forward),
        jax.ShapeDtypeStruct((1, INPUTS), "float32"),
        lambda apply, m: score(apply(m["x"]), m),
    )


def _as_axes(x):
    return sk.axes(x, None, "hidden")


_TYPE = Annotated[Any, sk.Axes(None, "hidden")]
_NAMES = (None, "hidden")
_INIT = nn.initializers.lecun_normal()

# Framework → way → a model, and the path rules it needs.
MODELS = {
    "dict": {
        "sk.axes": lambda: (_dict(_as_axes), {}),
        "path rule": lambda: (_dict(lambda x: x), {"up": _NAMES}),
        "PartitionSpec": lambda: (_dict(lambda x: sk.axes(x, SPEC)), {}),
    },
    "dataclass": {
        "sk.axes": lambda: (_dataclass(Any, _as_axes), {}),
        "type": lambda: (_dataclass(_TYPE), {}),
        "path rule": lambda: (_dataclass(Any), {"up": _NAMES}),
        "PartitionSpec": lambda: (_dataclass(Annotated[Any, SPEC]), {}),
    },
    "Flax NNX": {
        "Flax's metadata": lambda: (_nnx(nnx.with_partitioning(_INIT, _NAMES)), {}),
        "path rule": lambda: (_nnx(_INIT), {"up/kernel": _NAMES}),
        "PartitionSpec": lambda: (_nnx(_INIT), {"up/kernel": SPEC}),
    },
    "Flax Linen": {
        "Flax's metadata": lambda: (
            _linen(nn.with_logical_partitioning(_INIT, _NAMES)),
            {},
        ),
        "path rule": lambda: (_linen(_INIT), {"up/kernel": _NAMES}),
        "PartitionSpec": lambda: (
            _linen(nn.with_partitioning(_INIT, (None, "fsdp"))),
            {},
        ),
    },
    "Equinox": {
        "sk.axes": lambda: (_equinox(Any, _as_axes), {}),
        "type": lambda: (_equinox(_TYPE), {}),
        "path rule": lambda: (_equinox(Any), {"up/weight": _NAMES}),
        "PartitionSpec": lambda: (_equinox(Annotated[Any, SPEC]), {}),
    },
    "Haiku": {
        "path rule": lambda: (_haiku(), {"up/w": _NAMES}),
        "PartitionSpec": lambda: (_haiku(), {"up/w": SPEC}),
    },
}
WAYS = ["sk.axes", "type", "path rule", "Flax's metadata", "PartitionSpec"]
WHY_NOT = {
    ("dict", "type"): "a dict has no fields",
    ("Flax NNX", "type"): "Variables have metadata",
    ("Flax NNX", "sk.axes"): "Variables have metadata",
    ("Flax Linen", "type"): "parameters are a dict",
    ("Flax Linen", "sk.axes"): "initializers return arrays; Flax's own boxes say it",
    ("Haiku", "type"): "parameters are a dict",
    ("Haiku", "sk.axes"): "initializers return arrays",
    ("Haiku", "Flax's metadata"): "not Flax",
    ("dict", "Flax's metadata"): "not Flax",
    ("dataclass", "Flax's metadata"): "not Flax",
    ("Equinox", "Flax's metadata"): "not Flax",
}


def train(framework, way, optimizer, counts):
    """Returns the bits of the losses, and the digest of the state."""
    model, path_rules = MODELS[framework][way]()
    table = sk.annotate(model, RULES, path_rules)
    assert [dim for dim in table.dims if dim >= 0] == [1], "no annotation had an effect"
    with sk.Trainer(
        **{**model, "axis_rules": RULES},
        tx=OPTIMIZERS[optimizer](),
        data=data,
        path_rules=path_rules,
        num_microbatches=13,
        certify="off",
    ) as trainer:
        run = trainer.run(STEPS, membership=sk.scripted(counts))
        return [metrics.loss_bits for metrics in run], trainer.state_digest()
