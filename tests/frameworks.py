"""What the tests of frameworks share: data, and one run through device changes."""

import jax
import numpy as np
import optax

import shardkit as sk
from shardkit.annotations import strip

# One width for all, as each shape of a leaf costs a program for its digest.
ROWS, WIDTH, GRID = 26, 7, 13
CHANGES = {0: 8, 1: 5, 2: 2, 3: 8}
STEPS = 4


def data(step):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    return {"x": x, "y": np.tanh(x[:, ::-1])}


def trainer(model, **options):
    return sk.Trainer(
        **model,
        tx=optax.sgd(0.1, momentum=0.9),
        data=data,
        num_microbatches=GRID,
        eval=sk.EvalConfig(data=data, every=0),
        certify="always",
        **options,
    )


def run(model, counts, **options):
    """Returns losses, digest and evaluation, and the state as arrays of the host."""
    with trainer(model, **options) as made:
        losses = [m.loss_bits for m in made.run(STEPS, membership=sk.scripted(counts))]
        found = losses, made.state_digest(), made.evaluate()
        return found, jax.tree.map(np.asarray, made.state.model_state)


def losses_of(model, *, steps=(0, 1), indices=(0, 1)):
    """The training losses of single microbatches, with the keys a run gives them.

    All see the same rows and parameters, so that only what is drawn differs.
    """
    microbatch = {name: rows[:8] for name, rows in data(0).items()}
    root = sk.keys.root_key(0)
    first = made(model)
    loss = jax.jit(
        lambda first, key: model.loss(first.params, first.state, microbatch, key)
    )
    return {
        (step, index): float(
            loss(first, sk.keys.step_key(root, "loss", step, index)).loss_sum
        )
        for step in steps
        for index in indices
    }


def made(model):
    """Params and state without their annotations, as a loss sees them."""
    return strip(model.init(jax.random.key(0)))


def cut_dims(model, rules):
    """The specs that annotations and rules lead to."""
    mesh = sk.MeshSpec(fsdp=-1).build(jax.devices()[:1])
    specs = sk.infer_shardings(model.init(jax.random.key(0)), rules, mesh)
    return jax.tree.map(lambda sharding: tuple(sharding.spec), specs)


def batch_statistics(decay, steps=STEPS):
    """Running mean and variance of `x`: the mean of what all microbatches leave."""
    mean, var = np.zeros(WIDTH), np.ones(WIDTH)
    for step in range(steps):
        x = data(step)["x"].astype(np.float64).reshape(GRID, -1, WIDTH)
        mean = decay * mean + (1 - decay) * x.mean(1).mean(0)
        var = decay * var + (1 - decay) * x.var(1).mean(0)
    return mean, var
