"""Small training problems that the end-to-end tests and their workers share.

Sizes are odd, so that hardly any device count divides them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shardkit as sk
from models import gpt, mlp

PEAK = 1e-2


def _matrices(params):
    return jax.tree.map(lambda x: x.ndim >= 2, params)


def _layers_but_biases(params):
    return jax.tree.map(lambda x: x.ndim >= 2 and x.shape[0] > 7, params)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(PEAK, weight_decay=0.1, mask=_matrices),
    "clip-adamw": lambda: optax.chain(
        optax.clip_by_global_norm(0.05),
        optax.adamw(
            optax.cosine_decay_schedule(PEAK, 20), weight_decay=0.1, mask=_matrices
        ),
    ),
    "lion": lambda: optax.lion(PEAK / 10, weight_decay=0.1, mask=_layers_but_biases),
    "sgd": lambda: optax.chain(
        optax.clip(0.01), optax.sgd(PEAK, momentum=0.9, nesterov=True)
    ),
    "adafactor": lambda: optax.adafactor(
        PEAK,
        min_dim_size_to_factor=4,
        momentum=0.9,
        weight_decay_rate=1e-3,
        weight_decay_mask=_matrices,
    ),
    "lamb": lambda: optax.lamb(PEAK, weight_decay=0.1, mask=_matrices),
}


def cast(loss, dtype):
    """Makes a loss compute in another dtype, from float32 parameters."""

    def to_dtype(x):
        return x.astype(dtype) if x.dtype == jnp.float32 else x

    def computed(params, microbatch, key):
        return loss(*jax.tree.map(to_dtype, (params, microbatch)), key)

    return computed


def digits(
    optimizer="adamw",
    *,
    num_microbatches=24,
    num_rows=2,
    hidden_dim=7,
    dtype=None,
    **options,
):
    """`Trainer` arguments of an MLP with dropout on scikit-learn's digits."""
    model = mlp.build(hidden_dim=hidden_dim, num_layers=1, dropout=0.2)
    return {
        "init": model.init,
        "loss": cast(model.loss, dtype) if dtype else model.loss,
        "eval_loss": model.eval_loss,
        "axis_rules": model.axis_rules,
        "tx": OPTIMIZERS[optimizer](),
        "data": mlp.digits(global_batch_size=num_rows * num_microbatches, seed=3),
        "num_microbatches": num_microbatches,
        "seed": 5,
        **options,
    }


def language(optimizer="adamw", *, num_microbatches=24, dtype="float32", **options):
    """`Trainer` arguments of a GPT with dropout on made-up tokens."""
    model = gpt.build(
        vocab_size=11,
        num_layers=1,
        num_heads=1,
        embed_dim=10,
        mlp_dim=7,
        max_sequence_length=6,
        dropout=0.2,
        compute_dtype=dtype,
    )

    def data(step):
        tokens = np.random.default_rng(step).integers(11, size=(num_microbatches, 7))
        return {"tokens": tokens.astype(np.int32)}

    return {
        "init": model.init,
        "loss": model.loss,
        "eval_loss": model.eval_loss,
        "axis_rules": model.axis_rules,
        "tx": OPTIMIZERS[optimizer](),
        "data": data,
        "num_microbatches": num_microbatches,
        "seed": 5,
        **options,
    }


LINEAR_BATCH = 24


def linear_data(step):
    """A batch in which some rows do not count, more of them at the beginning."""
    rng = np.random.default_rng(step)
    counts = rng.random(LINEAR_BATCH) < np.linspace(0, 1, LINEAR_BATCH)
    return {
        "x": rng.normal(size=(LINEAR_BATCH, 5)).astype(np.float32),
        "y": rng.normal(size=(LINEAR_BATCH, 3)).astype(np.float32),
        "counts": counts.astype(np.float32),
    }


def linear_errors(params, batch):
    return batch["x"] @ params["kernel"] + params["bias"][None] - batch["y"]


def mean_loss(params, microbatch, key):
    return jnp.mean(linear_errors(params, microbatch) ** 2)


def weighted_loss(params, microbatch, key):
    losses = jnp.sum(linear_errors(params, microbatch) ** 2, axis=1)
    losses = losses * microbatch["counts"]
    return sk.LossOutput(
        losses.sum(), microbatch["counts"].sum(), {"largest": losses.max()}
    )


def linear(**options):
    """`Trainer` arguments of linear regression, which compiles quickly."""

    def init(key):
        return {
            "kernel": sk.axes(jax.random.normal(key, (5, 3)), "in", "out"),
            "bias": sk.axes(jnp.ones(3), "out"),
        }

    return {
        "init": init,
        "loss": mean_loss,
        "tx": optax.adam(0.1),
        "data": linear_data,
        "axis_rules": {"in": "fsdp"},
        "num_microbatches": 8,
        "mesh": sk.MeshSpec(data=2, fsdp=-1),
        **options,
    }


def _dropout_loss(params, microbatch, key):
    kept = sk.nn.dropout(microbatch["x"], sk.keys.stream(key, "dropout"), 0.2)
    return weighted_loss(params, {**microbatch, "x": kept}, key)


PROBLEMS = {
    "linear-clip-adam-ema": lambda: linear(
        loss=_dropout_loss,
        tx=optax.chain(optax.clip_by_global_norm(0.05), optax.adam(0.1)),
        ema=0.9,
    ),
    "digits-adamw-ema": lambda: digits("adamw", ema=0.9),
    "digits-lion-13": lambda: digits("lion", num_microbatches=13),
    "digits-sgd-bfloat16": lambda: digits("sgd", dtype=jnp.bfloat16),
    "digits-adafactor-13": lambda: digits("adafactor", num_microbatches=13),
    "digits-lamb": lambda: digits("lamb"),
    "digits-clip-adamw-static-scale": lambda: digits(
        "clip-adamw",
        num_microbatches=13,
        loss_scale=sk.LossScale(initial=2.0**10, growth_interval=None),
    ),
    # The scale is too large for float16 at first, falls, and grows too large again.
    "digits-clip-adamw-float16-dynamic-scale": lambda: digits(
        "clip-adamw",
        dtype=jnp.float16,
        loss_scale=sk.LossScale(initial=2.0**18, growth_interval=2),
    ),
    # Wide enough for XLA to cut its products over threads.
    "digits-wide-13": lambda: digits(
        "clip-adamw", num_microbatches=13, num_rows=48, hidden_dim=203
    ),
    "gpt-clip-adamw-13": lambda: language("clip-adamw", num_microbatches=13),
    "gpt-lion-bfloat16": lambda: language("lion", dtype="bfloat16", ema=0.99),
}
"""Name → a function that makes the `Trainer` arguments."""


def evaluated_digits(directory):
    """A trainer with all that several processes must agree on.

    Returns:
        The trainer, which saves into the directory, and a list that grows by what
        each evaluation found.
    """
    problem = PROBLEMS["digits-adamw-ema"]()
    trainer = sk.Trainer(
        **problem,
        mesh=sk.MeshSpec(data=2, fsdp=-1),
        checkpoint=sk.CheckpointConfig(directory=directory),
        eval=sk.EvalConfig(data=problem["data"], every=2),
        events=sk.EventLog(),
    )
    evaluated = []
    trainer.events.subscribe(
        lambda event: event.name == "eval" and evaluated.append(event.fields)
    )
    return trainer, evaluated


def consume(trainer, steps, script=None):
    """Trains, and returns the metrics of every step."""
    return list(trainer.run(steps=steps, membership=sk.scripted(script or {})))


def fields_of(events, name):
    return [event.fields for event in events if event.name == name]


CONFIG = """
devices = 8
[model]
factory = "models.mlp:build"
options = {hidden_dim = 7, num_layers = 1, dropout = 0.2}
[data]
factory = "faulty:digits"
global_batch_size = 26
num_microbatches = 13
[optimizer]
learning_rate = 1e-2
weight_decay = 0.1
clip_norm = 0.05
[mesh]
data = 2
fsdp = -1
[train]
steps = 12
ema = 0.9
eval_batches = 2
[checkpoint]
every = 3
"""
"""A config for `train.py`, whose data are those of `workers/faulty.py`."""
