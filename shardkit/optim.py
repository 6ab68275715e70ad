"""Optax transformations from the `[optimizer]` table.

Owns the translation of names and schedules, and nothing of the update itself. Its
invariant: the learning rate is a function of the step alone; neither `train.steps`
nor any number of devices enters. JAX is imported when something is built, not before.

References:
    Loshchilov & Hutter, Decoupled Weight Decay Regularization (ICLR 2019): adamw.
    Chen et al., Symbolic Discovery of Optimization Algorithms (NeurIPS 2023): lion.
    Shazeer & Stern, Adafactor (ICML 2018): adafactor.
    You et al., Large Batch Optimization for Deep Learning (ICLR 2020): lamb.
    You et al., Large Batch Training of Convolutional Networks (2017): lars.
"""

from collections.abc import Callable
from typing import Any

from shardkit.config import OptimizerSection
from shardkit.ramp import BatchRamp

__all__ = ["build_optimizer", "build_schedule"]

_STACKED = "layers"


def build_optimizer(
    section: OptimizerSection, params: Any = None, ramp: BatchRamp | None = None
) -> Any:
    """Builds clipping, the optimizer, its schedule and its weight decay.

    Args:
        section: The `[optimizer]` table.
        params: What the model's `init` returns, abstract or not, with its logical
            axes: a dim named `layers` stacks layers and makes no matrix of a vector.
            None is a model without such dims.
        ramp: How large the batch is, where `scale_to_batch` asks for it.

    Returns:
        An `optax.GradientTransformation`, for those parameters if they were given.

    >>> tx = build_optimizer(OptimizerSection(name="lion", learning_rate=1e-4))
    >>> sorted(tx._asdict())
    ['init', 'update']
    """
    import optax

    from shardkit.clipping import clip_spikes

    mask = _matrices(params) if section.decay_mask == "matrices" else None
    rate = build_schedule(section, ramp)
    moments = {
        name: getattr(section, name)
        for name in ("b1", "b2")
        if getattr(section, name) is not None
    }
    decay: dict[str, Any] = {"weight_decay": section.weight_decay, "mask": mask}
    match section.name:
        case "adamw":
            update = optax.adamw(rate, **moments, **decay)
        case "lion":
            update = optax.lion(rate, **moments, **decay)
        case "lamb":
            update = optax.lamb(rate, **moments, **decay)
        case "lars":
            # As published, neither rescaled nor decayed are biases and norms.
            matrices = _matrices(params)
            update = optax.lars(
                rate,
                section.weight_decay,
                weight_decay_mask=True if mask is None else mask,
                trust_ratio_mask=matrices,
                momentum=0.9 if section.momentum is None else section.momentum,
            )
        case "adafactor":
            update = optax.adafactor(
                rate,
                momentum=section.momentum,
                weight_decay_rate=section.weight_decay or None,
                weight_decay_mask=mask,
            )
        case "sgd":
            # The decay goes beside the momentum, not through it.
            update = optax.chain(
                optax.trace(section.momentum) if section.momentum else optax.identity(),
                optax.add_decayed_weights(**decay),
                optax.scale_by_learning_rate(rate),
            )
    clips = []
    if section.clip_z is not None:
        steps = section.clip_z_warmup_steps
        clips.append(
            clip_spikes(
                section.clip_z, **({} if steps is None else {"warmup_steps": steps})
            )
        )
    if section.clip_norm is not None:
        clips.append(optax.clip_by_global_norm(section.clip_norm))
    return optax.chain(*clips, update) if clips else update


def build_schedule(
    section: OptimizerSection, ramp: BatchRamp | None = None
) -> Callable[[Any], Any]:
    """Returns the learning rate as a function of the step.

    The warm-up begins above 0, so that step 0 trains, and reaches the peak at step
    `warmup_steps`; the rest ends at `end_factor` times the peak, at `horizon_steps`.
    All of it follows the batch of a ramp, if `scale_to_batch` says so.

    >>> rate = build_schedule(OptimizerSection(
    ...     learning_rate=1.0, schedule="linear", warmup_steps=1, horizon_steps=3))
    >>> [float(rate(step)) for step in range(5)]
    [0.5, 1.0, 0.5, 0.0, 0.0]
    """
    import optax

    peak, warmup = section.learning_rate, section.warmup_steps
    steps = (section.horizon_steps or 0) - warmup
    match section.schedule:
        case "constant":
            course = optax.constant_schedule(peak)
        case "cosine":
            course = optax.cosine_decay_schedule(peak, steps, alpha=section.end_factor)
        case "linear":
            course = optax.linear_schedule(peak, peak * section.end_factor, steps)
    if warmup:
        rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
        course = optax.join_schedules([rise, course], [warmup])
    if section.scale_to_batch is None or ramp is None:
        return course
    from shardkit.schedules import scale_to_batch

    return scale_to_batch(course, ramp, section.scale_to_batch)


def _matrices(annotated: Any) -> Callable[[Any], Any]:
    """Returns the mask of the leaves that have two dims within a layer."""
    import jax

    from shardkit.annotations import leaf_axes

    # Optax shows a mask the bare parameters, so the names are read beforehand.
    names = None if annotated is None else leaf_axes(annotated)

    def mask(params: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        known = [None] * len(leaves) if names is None else names
        return treedef.unflatten(
            leaf.ndim - (axes or ()).count(_STACKED) >= 2
            for leaf, axes in zip(leaves, known, strict=True)
        )

    return mask
