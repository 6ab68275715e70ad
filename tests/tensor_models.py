"""Models of a few products that nobody annotated, and what a device mesh makes of them.

Each is a dict of arrays and a function `(params, microbatch) → array`, whose squares
the loss sums up.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import shardkit as sk
from shardkit.annotations import strip
from shardkit.hlo import find_collectives
from shardkit.model import call_loss
from shardkit.model_state import split_variables

ROWS, LENGTH, EMBED, MLP, HEADS, KV_HEADS, HEAD, VOCAB = 2, 8, 16, 32, 4, 2, 4, 64
BATCH = {
    "x": jax.random.normal(jax.random.key(1), (ROWS, LENGTH, EMBED)),
    "label": jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % VOCAB,
}


def arrays(**shapes):
    """Arrays of these shapes."""
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=shape) * 0.2, jnp.float32)
        for name, shape in shapes.items()
    }


def model(params, apply):
    return sk.Model(
        init=lambda key: params,
        loss=lambda params, microbatch, key: jnp.sum(apply(params, microbatch) ** 2),
    )


def norm(x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1)


def attend(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k), -1)
    return jnp.einsum("bhts,bshk->bthk", weights, v)


def heads(x, num=HEADS):
    return x.reshape(ROWS, LENGTH, num, HEAD)


def flat(x):
    return x.reshape(ROWS, LENGTH, -1)


def mlp(params, x):
    return jax.nn.gelu(x @ params["up"]) @ params["down"]


def residual(params, batch):
    return batch["x"] + mlp(params, norm(batch["x"]))


def biased(params, batch):
    x = batch["x"]
    h = jax.nn.relu(norm(x) @ params["up"] + params["in_bias"])
    return x + h @ params["down"] + params["out_bias"]


def swiglu(params, batch):
    x = norm(batch["x"])
    h = jax.nn.silu(x @ params["gate"]) * (x @ params["up"])
    return batch["x"] + h @ params["down"]


def attention(params, batch):
    x = norm(batch["x"])
    q, k, v = (heads(x @ params[name]) for name in "qkv")
    return batch["x"] + flat(attend(q, k, v)) @ params["out"]


def fused(params, batch):
    parts = jnp.einsum("btd,dchk->cbthk", norm(batch["x"]), params["qkv"])
    return batch["x"] + jnp.einsum("bthk,hkd->btd", attend(*parts), params["out"])


def fused_flat(params, batch):
    parts = jnp.split(norm(batch["x"]) @ params["qkv"], 3, -1)
    return batch["x"] + flat(attend(*map(heads, parts))) @ params["out"]


def grouped(params, batch):
    x = norm(batch["x"])
    q = heads(x @ params["q"])
    k, v = (
        jnp.repeat(heads(x @ params[name], KV_HEADS), HEADS // KV_HEADS, axis=2)
        for name in "kv"
    )
    return batch["x"] + flat(attend(q, k, v)) @ params["out"]


def parallel(params, batch):
    """As in GPT-J: attention and MLP read the same and are added together."""
    x = norm(batch["x"])
    q, k, v = (heads(x @ params[name]) for name in "qkv")
    return batch["x"] + flat(attend(q, k, v)) @ params["out"] + mlp(params, x)


def shared_layers(params, batch):
    """As in ALBERT: one layer, many times, with biases and a mask."""
    x, mask = batch["x"], jnp.where(jnp.tri(LENGTH) > 0, 0.0, -1e9)
    for _ in range(2):
        q, k, v = (heads(x @ params[name]) for name in "qkv")
        scores = jnp.einsum("bthk,bshk->bhts", q, k) + mask
        y = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, -1), v)
        x = norm(x + flat(y) @ params["out"])
        x = norm(x + jax.nn.gelu(x @ params["up"] + params["bias"]) @ params["down"])
    return x


def low_rank(params, batch):
    up = params["up"] + params["left"] @ params["right"]
    return batch["x"] + jax.nn.relu(batch["x"] @ up) @ params["down"]


def hidden_norm(params, batch):
    h = norm(jax.nn.relu(batch["x"] @ params["up"])) * params["scale"]
    return batch["x"] + h @ params["down"]


def experts(params, batch):
    x = batch["x"]
    gates = jax.nn.softmax(x @ params["router"], -1)
    h = jax.nn.silu(jnp.einsum("btd,edm->btem", x, params["gate"]))
    h = h * jnp.einsum("btd,edm->btem", x, params["up"])
    return x + jnp.einsum("btem,emd,bte->btd", h, params["down"], gates)


def labelled(params, batch):
    x = residual(params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(
        x @ params["head"], batch["label"]
    )


def tied(params, batch):
    x = params["table"][batch["label"]]
    x = x + mlp(params, x)
    return sk.nn.cross_entropy(x @ params["table"].T, batch["label"])


def one_hot(params, batch):
    x = jax.nn.one_hot(batch["label"], VOCAB) @ params["table"]
    x = x + mlp(params, x)
    return sk.nn.cross_entropy(x @ params["table"].T, batch["label"])


@jax.custom_vjp
def swish(x):
    return x * jax.nn.sigmoid(x)


swish.defvjp(
    lambda x: (swish(x), x),
    lambda x, g: (g * jax.nn.sigmoid(x) * (1 + x * (1 - jax.nn.sigmoid(x))),),
)


def scanned(params, batch):
    @jax.checkpoint
    def layer(x, weights):
        hidden = jax.jit(lambda x: swish(norm(x) @ weights["up"]))(x)
        return x + hidden @ weights["down"], None

    return jax.lax.scan(layer, batch["x"], params)[0]


def summed_up(params, batch):
    return batch["x"] + jnp.cumsum(batch["x"] @ params["up"], -1) @ params["down"]


def branched(params, batch):
    x = batch["x"]
    return jax.lax.cond(x[0, 0, 0] > 0, lambda x: x + mlp(params, x), lambda x: x, x)


def looped(params, batch):
    body = lambda i, x: x + mlp(params, x) * i  # noqa: E731
    return jax.lax.fori_loop(0, batch["label"][0, 1], body, batch["x"])


_MLP = {"up": (EMBED, MLP), "down": (MLP, EMBED)}
_WIDE = HEADS * HEAD
_QKV = {**dict.fromkeys("qkv", (EMBED, _WIDE)), "out": (_WIDE, EMBED)}
_ROW = 4 * ROWS * LENGTH * EMBED
_PLACE = 4 * ROWS * LENGTH

CASES = {
    "residual": (residual, _MLP, {"up": 1, "down": 0}, {"row": (1, _ROW)}),
    "biased": (
        biased,
        {**_MLP, "in_bias": (MLP,), "out_bias": (EMBED,)},
        {"up": 1, "in_bias": 0, "down": 0},
        {"row": (1, _ROW)},
    ),
    "swiglu": (
        swiglu,
        {**_MLP, "gate": (EMBED, MLP)},
        {"up": 1, "gate": 1, "down": 0},
        {"row": (1, _ROW)},
    ),
    "attention": (
        attention,
        _QKV,
        {"q": 1, "k": 1, "v": 1, "out": 0},
        {"row": (1, _ROW)},
    ),
    "fused": (
        fused,
        {"qkv": (EMBED, 3, HEADS, HEAD), "out": (HEADS, HEAD, EMBED)},
        {"qkv": 2, "out": 0},
        {"row": (1, _ROW)},
    ),
    "fused_flat": (
        fused_flat,
        {"qkv": (EMBED, 3 * _WIDE), "out": (_WIDE, EMBED)},
        {},
        {},
    ),
    "grouped": (
        grouped,
        {**_QKV, **dict.fromkeys("kv", (EMBED, KV_HEADS * HEAD))},
        {"q": 1, "k": 1, "v": 1, "out": 0},
        {"row": (1, _ROW)},
    ),
    "parallel": (
        parallel,
        {**_QKV, **_MLP},
        {"q": 1, "k": 1, "v": 1, "out": 0, "up": 1, "down": 0},
        {"row": (2, 2 * _ROW)},
    ),
    "shared_layers": (
        shared_layers,
        {**_QKV, **_MLP, "bias": (MLP,)},
        {"q": 1, "k": 1, "v": 1, "out": 0, "up": 1, "bias": 0, "down": 0},
        {"row": (4, 4 * _ROW)},
    ),
    "low_rank": (
        low_rank,
        {**_MLP, "left": (EMBED, 2), "right": (2, MLP)},
        {"up": 1, "right": 1, "down": 0},
        {"row": (1, _ROW)},
    ),
    "hidden_norm": (
        hidden_norm,
        {**_MLP, "scale": (MLP,)},
        {"up": 1, "scale": 0, "down": 0},
        {"row": (1, _ROW), "sum": (2, 2 * _PLACE)},
    ),
    "experts": (
        experts,
        {
            "router": (EMBED, 4),
            "gate": (4, EMBED, MLP),
            "up": (4, EMBED, MLP),
            "down": (4, MLP, EMBED),
        },
        {"gate": 2, "up": 2, "down": 1},
        {"row": (1, 4 * _ROW)},
    ),
    "labelled": (
        labelled,
        {**_MLP, "head": (EMBED, VOCAB)},
        {"up": 1, "down": 0, "head": 1},
        {"row": (1, _ROW), "sum": (3, 3 * _PLACE)},
    ),
    "tied": (
        tied,
        {**_MLP, "table": (VOCAB, EMBED)},
        {"up": 1, "down": 0, "table": 0},
        {"lookup": (1, _ROW), "row": (1, _ROW), "sum": (3, 3 * _PLACE)},
    ),
    "one_hot": (
        one_hot,
        {**_MLP, "table": (VOCAB, EMBED)},
        {"up": 1, "down": 0, "table": 0},
        {"row": (2, 2 * _ROW), "sum": (3, 3 * _PLACE)},
    ),
    "scanned": (
        scanned,
        {"up": (3, EMBED, MLP), "down": (3, MLP, EMBED)},
        {"up": 2, "down": 1},
        {"row": (3, 3 * _ROW)},
    ),
    "summed_up": (summed_up, _MLP, {}, {}),
    "branched": (branched, _MLP, {}, {}),
    "looped": (looped, _MLP, {}, {}),
}
"""Name → function, shapes of parameters, the dims that are cut, what is exchanged as
`of → (count, bytes)`."""


def case(name):
    """The model of a case."""
    apply, shapes, _, _ = CASES[name]
    return model(arrays(**shapes), apply)


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
