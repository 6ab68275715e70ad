"""Factories for configs: data and a model on which things go wrong when asked to."""

import os
import threading
import time
from pathlib import Path

import jax
import numpy as np

from models import mlp


def digits(*, global_batch_size, seed=0, split="train", nan_step=-1):
    """Digits that take `STEP_S` seconds a step, one of which may not be a number."""
    batches = mlp.digits(global_batch_size=global_batch_size, seed=seed, split=split)
    step_s = float(os.environ.get("STEP_S", "0"))

    def batch(step):
        time.sleep(step_s)
        found = batches(step)
        if step == nan_step:
            found["image"] = np.full_like(found["image"], np.nan)
        return found

    return batch


def build(hidden_dim=7):
    """An MLP whose loss depends on the device that computes it."""
    model = mlp.build(hidden_dim=hidden_dim, num_layers=1)

    def loss(params, microbatch, key):
        try:
            index = jax.lax.axis_index(("data", "fsdp"))
        except NameError:
            # There is no mesh yet where only shapes are asked for.
            index = 0
        return model.loss(params, microbatch, jax.random.fold_in(key, index))

    return type(model)(init=model.init, loss=loss, axis_rules=model.axis_rules)


def bare(hidden_dim=7):
    """An MLP without logical axes."""
    model = mlp.build(hidden_dim=hidden_dim, num_layers=1)

    def init(key):
        annotated = model.init(key)
        has_names = lambda x: hasattr(x, "names")  # noqa: E731
        return jax.tree.map(lambda x: x.value, annotated, is_leaf=has_names)

    return type(model)(init=init, loss=model.loss)


def slow(**options):
    """An MLP that takes `TRACE_S` seconds to trace for a program, and says so."""
    model = mlp.build(**options)

    def loss(*args):
        if threading.current_thread() is not threading.main_thread():
            Path("tracing").touch()
            time.sleep(float(os.environ.get("TRACE_S", "0")))
        return model.loss(*args)

    return type(model)(init=model.init, loss=loss, axis_rules=model.axis_rules)
