"""Every optax transformation, found by looking, with what its constructor is given."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import optax

import optax.contrib  # isort: skip

KEY = jax.random.key(3)
SHAPES = {"matrix": (6, 10), "scalar": (), "stack": (3, 7, 2), "vector": (5,)}


def matrices(params):
    """A mask of the leaves that are matrices."""
    return jax.tree.map(lambda x: x.ndim == 2, params)


def without_scalars(tx):
    """The same, for leaves that have dims; some transformations fail on others."""
    return optax.masked(tx, lambda params: jax.tree.map(lambda x: x.ndim > 0, params))


def quietly(make, *args):
    """Calls what optax itself calls in a way that it has deprecated."""
    with warnings.catch_warnings(action="ignore"):
        return make(*args)


def dim_numbers(tree):
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), tree)


def some_steps(step):
    """A condition that holds at every other step."""
    return step % 2 == 0


def hessian_of_one():
    """An estimator of the Hessian that needs no loss."""
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.ones_like, updates))


def norm(tree):
    return optax.tree.norm(tree)


STEPS = optax.linear_schedule(1e-1, 0.0, 9)
SGD, ADAM = optax.sgd(1e-2, momentum=0.9), optax.adam(1e-2)

ARGUMENTS = {
    "adafactor": lambda make: make(
        1e-2, min_dim_size_to_factor=2, momentum=0.9, weight_decay_rate=1e-3
    ),
    "adamw": lambda make: make(STEPS, weight_decay=0.1, mask=matrices),
    "adamaxw": lambda make: make(1e-2, mask=matrices),
    "adaptive_grad_clip": lambda make: make(0.01),
    "add_decayed_weights": lambda make: make(0.1, mask=matrices),
    "add_noise": lambda make: make(0.1, 0.5, KEY),
    "apply_every": lambda make: make(2),
    "apply_if_finite": lambda make: make(ADAM, 3),
    "chain": lambda make: make(optax.clip(0.1), ADAM),
    "clip": lambda make: make(0.1),
    "clip_by_block_rms": lambda make: make(0.1),
    "clip_by_global_norm": lambda make: make(0.1),
    "conditionally_mask": lambda make: make(ADAM, some_steps),
    "conditionally_transform": lambda make: make(ADAM, some_steps),
    "contrib.differentially_private_aggregate": lambda make: make(1.0, 0.1, KEY),
    "contrib.dpsgd": lambda make: quietly(make, 1e-2, 1.0, 0.1, 0),
    "contrib.galore": lambda make: make(1e-2, rank=2, update_proj_gap=2),
    "contrib.mechanize": lambda make: make(SGD),
    "contrib.muon": lambda make: make(1e-2, weight_decay=0.1, adaptive=True),
    "contrib.sam": lambda make: make(SGD, optax.sgd(1e-1)),
    "contrib.scale_by_galore": lambda make: make(rank=2, update_proj_gap=2),
    "contrib.scale_by_muon": lambda make: optax.masked(
        make(weight_dimension_numbers=dim_numbers), matrices
    ),
    "contrib.schedule_free": lambda make: make(optax.sgd(1e-2), 1e-2),
    "contrib.schedule_free_adamw": lambda make: make(1e-2, warmup_steps=2),
    "contrib.schedule_free_sgd": lambda make: make(1e-2, warmup_steps=2),
    "contrib.split_real_and_imaginary": lambda make: make(ADAM),
    "ema": lambda make: make(0.9),
    "flatten": lambda make: make(ADAM),
    "freeze": lambda make: make({name: name == "matrix" for name in SHAPES}),
    "inject_hyperparams": lambda make: make(optax.adamw)(STEPS, weight_decay=0.1),
    "inject_stateful_hyperparams": lambda make: quietly(make, optax.adamw)(
        STEPS, b1=0.8
    ),
    "keep_params_nonnegative": lambda make: make(),
    "lamb": lambda make: make(1e-2, weight_decay=0.1, mask=matrices),
    "lars": lambda make: make(1e-2, weight_decay=0.1, momentum=0.9),
    "lookahead": lambda make: make(SGD, 2, 0.5),
    "masked": lambda make: make(ADAM, matrices),
    "measure_with_ema": lambda make: make(norm, 0.9),
    "monitor": lambda make: make({"norm": norm}),
    "MultiSteps": lambda make: make(ADAM, 2, use_grad_mean=True),
    "multi_transform": lambda make: make({True: ADAM, False: SGD}, matrices),
    "named_chain": lambda make: make(("clip", optax.clip(0.1)), ("adam", ADAM)),
    "noisy_sgd": lambda make: make(1e-2, key=KEY),
    "optimistic_adam": lambda make: quietly(make, 1e-2),
    "scale": lambda make: make(0.5),
    "scale_by_backtracking_linesearch": lambda make: make(3),
    "scale_by_distance_over_gradients": lambda make: without_scalars(make()),
    "scale_by_schedule": lambda make: make(STEPS),
    "scale_by_sm3": lambda make: without_scalars(make()),
    "scale_by_zoom_linesearch": lambda make: make(3),
    "selective_transform": lambda make: make(
        ADAM, freeze_mask={name: name == "matrix" for name in SHAPES}
    ),
    "sgd": lambda make: make(1e-2, momentum=0.9, nesterov=True),
    "sm3": lambda make: without_scalars(make(1e-2)),
    "snapshot": lambda make: make("norm", norm),
    "stateless": lambda make: make(lambda updates, params: updates),
    "stateless_with_tree_map": lambda make: make(lambda update, param: update - param),
    "trace": lambda make: make(0.9, nesterov=True),
    "with_extra_args_support": lambda make: make(ADAM),
}
VARIANTS = {
    "MultiSteps of muon": lambda: optax.MultiSteps(optax.contrib.muon(1e-2), 2),
    "MultiSteps that skips": lambda: optax.MultiSteps(
        ADAM, 2, should_skip_update_fn=optax.skip_not_finite
    ),
    "apply_if_finite of adafactor": lambda: optax.apply_if_finite(
        optax.adafactor(1e-2, min_dim_size_to_factor=2), 2
    ),
    "contrib.muon, Dion's": lambda: optax.contrib.muon(
        1e-2, ns_coeffs="dion", preconditioning="schatten"
    ),
    "contrib.muon, spectral": lambda: optax.contrib.muon(
        1e-2, preconditioning="spectral", consistent_rms=0.2
    ),
    "contrib.sophia with a Hessian": lambda: optax.contrib.sophia(
        1e-2, hessian_diagonal_fn=hessian_of_one()
    ),
    "lbfgs without a search": lambda: optax.lbfgs(1e-2, linesearch=None),
    "multi_transform of muon": lambda: optax.multi_transform(
        {True: optax.contrib.muon(1e-2), False: optax.adafactor(1e-2)}, matrices
    ),
}
"""Name → what combines some of the others, or is told otherwise than above."""

# What makes no transformation, and does not say in its signature what it makes.
OTHERS = {
    "GradientTransformation",
    "GradientTransformationExtraArgs",
    "WrappedSchedule",
    "bias_correction",
    "contrib.schedule_free_eval_params",
    "matrix_inverse_pth_root",
    "sigmoid_binary_cross_entropy",
    "update_infinity_moment",
    "update_moment",
    "update_moment_per_elem_norm",
}


def exported():
    """Yields `(name, callable)` of all that optax and its contrib export."""
    for prefix, module in (("", optax), ("contrib.", optax.contrib)):
        for name, thing in sorted(vars(module).items()):
            is_own = getattr(thing, "__module__", "").startswith("optax")
            if not name.startswith("_") and callable(thing) and is_own:
                yield prefix + name, thing


def may_be_transformation(thing):
    """Whether something can make a transformation, going by what it says of itself."""
    if inspect.isclass(thing):
        return hasattr(thing, "update")
    returned = inspect.signature(thing).return_annotation
    return returned is inspect.Signature.empty or "GradientTransf" in str(returned)


def aliases():
    """Constructor → the names that it is exported by, of all transformations."""
    names = {}
    for name, thing in exported():
        if may_be_transformation(thing) and name not in OTHERS:
            names.setdefault(thing, []).append(name)
    return names


def found_transformations():
    """Lists the names of all that make a transformation, each once."""
    return [names[0] for names in aliases().values()]


def build(name):
    """Builds a transformation, from the arguments above or the plainest."""
    if name in VARIANTS:
        return VARIANTS[name]()
    make = optax
    for part in name.split("."):
        make = getattr(make, part)
    if name in ARGUMENTS:
        return ARGUMENTS[name](make)
    required = [
        parameter.name
        for parameter in inspect.signature(make).parameters.values()
        if parameter.default is parameter.empty
    ]
    if required not in ([], ["learning_rate"]):
        raise KeyError(f"say in ARGUMENTS what optax.{name} is given for {required}")
    return make(*[1e-2] * len(required))
