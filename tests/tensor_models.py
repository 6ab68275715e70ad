"""Models of a few products that nobody annotated, and how they are to be cut.

Each is a dict of arrays and a function `(params, microbatch) → array`, whose squares
the loss sums up.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shardkit as sk

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


def encoder_decoder(params, batch):
    def add(name, x, y):
        q, k, v = (
            heads(z @ params[f"{name}/{part}"])
            for z, part in ((norm(x), "q"), (y, "k"), (y, "v"))
        )
        return x + flat(attend(q, k, v)) @ params[f"{name}/out"]

    memory = add("encoder", batch["x"], norm(batch["x"]))
    memory = norm(memory + mlp(params, norm(memory)))
    x = params["table"][batch["label"]]
    x = add("cross", add("decoder", x, norm(x)), memory)
    return sk.nn.cross_entropy(norm(x) @ params["head"], batch["label"])


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
_THREE = {
    f"{name}/{part}": shape
    for name in ("encoder", "decoder", "cross")
    for part, shape in _QKV.items()
}
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
    "encoder_decoder": (
        encoder_decoder,
        {**_THREE, **_MLP, "table": (VOCAB, EMBED), "head": (EMBED, VOCAB)},
        {
            **{path: 0 if path.endswith("out") else 1 for path in _THREE},
            **{"up": 1, "down": 0, "table": 0, "head": 1},
        },
        {"row": (4, 4 * _ROW), "lookup": (1, _ROW), "sum": (3, 3 * _PLACE)},
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
