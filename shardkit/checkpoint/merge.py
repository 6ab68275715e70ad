"""Averages over saved checkpoints.

Owns which weights a way of merging gives to which checkpoint, and which leaves are
averaged. Invariant: only floats of parameters are; they are summed in float64 and
rounded once, and checkpoints that agree on an element keep its bits. Whatever else
there is (integers, keys, steps, moments) comes from the newest checkpoint or has to be
the same in all, as the caller says. Nothing is read: the results are views.

References:
    Kaddour, Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest
    Weight Averaging (2022): LAWA.
    Wortsman et al., Model Soups: Averaging Weights of Multiple Fine-tuned Models
    Improves Accuracy without Increasing Inference Time (ICML 2022).
    Tian et al., WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
    Pre-training (arXiv:2507.17634, 2025).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from shardkit.checkpoint.mapping import counted, format_rows
from shardkit.checkpoint.remap_values import check_weights
from shardkit.checkpoint.unused import nearest
from shardkit.checkpoint.value_views import EqualView, MeanView
from shardkit.checkpoint.views import View, is_floating
from shardkit.errors import ConfigError, RestoreError

__all__ = [
    "average",
    "average_by_metric",
    "decay_weights",
    "ema",
    "ema_weights",
    "metric_weights",
    "schedule_weights",
]

Tree = Mapping[str, View]
Rest = Literal["newest", "equal"]
_DECAYS = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "inverse_sqrt": lambda t: 1 - math.sqrt(t),
}


def average(
    trees: Sequence[Tree],
    weights: Sequence[float] | None = None,
    *,
    params: Sequence[str] = ("params",),
    rest: Rest = "newest",
) -> dict[str, View]:
    """Averages checkpoints; without weights, as LAWA does with the latest ones.

    Args:
        trees: The checkpoints, the newest last, of the same paths, shapes and dtypes.
        weights: A weight for each, 0 or more; they are divided by their sum.
        params: What the paths of parameters begin with.
        rest: What becomes of what is no float of a parameter: it is taken from the
            newest checkpoint, or has to be `"equal"` in all, which is checked when it
            is read.

    Raises:
        ConfigError: If there is no checkpoint, the weights do not fit, or nothing
            is under one of `params`.
        RestoreError: Listing the leaves in which the checkpoints differ.

    >>> import numpy as np
    >>> from shardkit.checkpoint.views import ArrayView
    >>> trees = [{"params/w": ArrayView(np.float32([x]))} for x in (1, 2, 6)]
    >>> average(trees)["params/w"].read(((0, 1),)).tolist()
    [3.0]
    """
    if not trees:
        raise ConfigError("merge: expected one checkpoint or more, found none")
    if rest not in ("newest", "equal"):
        raise ConfigError(f"merge: expected rest 'newest' or 'equal', found {rest!r}")
    found = [1.0] * len(trees) if weights is None else weights
    if len(found) != len(trees):
        raise ConfigError(
            f"merge: expected a weight for each of {len(trees)} checkpoints, found "
            f"{len(found)} weights"
        )
    found = check_weights("merge", found)
    _check_alike(trees)
    roots = tuple(f"{root}/" for root in params)
    _check_roots(params, trees[-1])
    merged: dict[str, View] = {}
    for path, newest in trees[-1].items():
        if path.startswith(roots) and is_floating(newest.dtype):
            merged[path] = MeanView([tree[path] for tree in trees], found)
        elif rest == "equal":
            merged[path] = EqualView([tree[path] for tree in trees])
        else:
            merged[path] = newest
    return merged


def _check_roots(roots: Sequence[str], tree: Tree) -> None:
    """Refuses to average nothing in silence."""
    bad = [
        f"{root!r} ({hint[2:]})" if (hint := nearest(root, tree)) else repr(root)
        for root in roots
        if not any(path.startswith(f"{root}/") for path in tree)
    ]
    if bad or not roots:
        there = dict.fromkeys(path.split("/")[0] for path in tree if "/" in path)
        raise ConfigError(
            f"merge: nothing is under {', '.join(bad) or 'no prefix'}; expected some "
            f"of {', '.join(there) or 'none, as no path has two parts'}"
        )


def average_by_metric(
    trees: Sequence[Tree],
    metrics: Sequence[float],
    *,
    temperature: float | None = None,
    power: float | None = None,
    better: Literal["lower", "higher"] = "lower",
    params: Sequence[str] = ("params",),
    rest: Rest = "newest",
) -> dict[str, View]:
    """Averages checkpoints with the weights of `metric_weights`.

    See there, and `average`, for the arguments and errors.
    """
    weights = metric_weights(
        metrics, temperature=temperature, power=power, better=better
    )
    return average(trees, weights, params=params, rest=rest)


def ema(
    trees: Sequence[Tree],
    decay: float,
    *,
    params: Sequence[str] = ("params",),
    rest: Rest = "newest",
) -> dict[str, View]:
    """Averages checkpoints with the weights of `ema_weights`.

    See there, and `average`, for the arguments and errors.
    """
    return average(trees, ema_weights(decay, len(trees)), params=params, rest=rest)


def metric_weights(
    metrics: Sequence[float],
    *,
    temperature: float | None = None,
    power: float | None = None,
    better: Literal["lower", "higher"] = "lower",
) -> list[float]:
    """Weighs checkpoints by a metric, such as their validation losses.

    Args:
        metrics: One number for each checkpoint.
        temperature: Weights are proportional to `exp(∓ metric / temperature)`, in the
            metric's unit; or else
        power: weights are proportional to `metric ** ∓ power`, for metrics above 0.
        better: Which metrics weigh more.

    Returns:
        Weights that sum to 1.

    Raises:
        ConfigError: If metrics are not finite, or not exactly one of temperature and
            power is given and above 0.

    >>> [round(w, 3) for w in metric_weights([1.0, 2.0], power=1)]
    [0.667, 0.333]
    """
    scale = temperature if power is None else power
    if (temperature is None) == (power is None) or not 0 < (scale or 0) < math.inf:
        raise ConfigError(
            "merge: expected a temperature or a power above 0, found temperature="
            f"{temperature} and power={power}"
        )
    if better not in ("lower", "higher"):
        raise ConfigError(f"merge: expected 'lower' or 'higher', found {better!r}")
    least = -math.inf if power is None else 0.0
    if not all(math.isfinite(m) and m > least for m in metrics) or not metrics:
        raise ConfigError(
            f"merge: expected finite metrics{', above 0' if power else ''}, found "
            f"{list(metrics)}"
        )
    sign = -1 if better == "lower" else 1
    if power is None:
        logs = [sign * metric / (temperature or 1) for metric in metrics]
    else:
        logs = [sign * power * math.log(metric) for metric in metrics]
    return _normalised([math.exp(log - max(logs)) for log in logs])


def ema_weights(decay: float, num: int) -> list[float]:
    """Weighs checkpoints as an exponential moving average that starts with the first.

    Args:
        decay: What the average keeps of itself when a checkpoint comes, from 0 to 1.
        num: The number of checkpoints, the newest last.

    Raises:
        ConfigError: If they are none.

    >>> ema_weights(0.5, 3)
    [0.25, 0.25, 0.5]
    """
    if not 0 <= decay < 1 or num < 1:
        raise ConfigError(
            f"merge: expected a decay from 0 to less than 1 and one checkpoint or "
            f"more, found {decay} and {num}"
        )
    later = [(1 - decay) * decay ** (num - 1 - n) for n in range(1, num)]
    return [decay ** (num - 1), *later]


def decay_weights(
    decay: Literal["linear", "cosine", "inverse_sqrt"], num: int
) -> list[float]:
    """Weighs checkpoints of a constant learning rate as if it had decayed to 0.

    The rate is 1 at the first checkpoint and would be 0 one after the last: a linear
    decay makes all weights equal.

    Args:
        decay: The shape: `1 - t`, `(1 + cos πt) / 2` or `1 - √t`.
        num: The number of checkpoints, saved at equal distances, the newest last.

    Raises:
        ConfigError: If there is no such shape, or no checkpoint.

    >>> decay_weights("linear", 4)
    [0.25, 0.25, 0.25, 0.25]
    """
    if decay not in _DECAYS or num < 1:
        raise ConfigError(
            f"merge: expected one of {', '.join(_DECAYS)} and one checkpoint or more, "
            f"found {decay!r} and {num}"
        )
    return schedule_weights([_DECAYS[decay](n / num) for n in range(num)])


def schedule_weights(rates: Sequence[float]) -> list[float]:
    """Weighs checkpoints so that the updates between them count as under a schedule.

    A mean gives the update that led to checkpoint `n` the sum of the weights from `n`
    on. So weights that are differences of decaying rates give each update its rate.

    Args:
        rates: The learning rate that led to each checkpoint, in any unit; the first is
            the one that all were trained with. None is above the one before.

    Returns:
        Weights that sum to 1.

    Raises:
        ConfigError: If the rates rise, or are not above 0 at first.

    >>> schedule_weights([1.0, 0.5, 0.25])
    [0.5, 0.25, 0.25]
    """
    falls = all(a >= b for a, b in zip(rates, [*rates[1:], 0.0], strict=False))
    if not rates or not falls or not 0 < rates[0] < math.inf:
        raise ConfigError(
            "merge: expected learning rates that do not rise, from above 0 to 0 or "
            f"more, found {list(rates)}"
        )
    after = [*rates[1:], 0.0]
    return _normalised([a - b for a, b in zip(rates, after, strict=True)])


def _normalised(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _check_alike(trees: Sequence[Tree]) -> None:
    newest, rows = trees[-1], []
    for number, tree in enumerate(trees[:-1]):
        for path in dict.fromkeys([*newest, *tree]):
            found, expected = (
                each[path].describe() if path in each else "nothing"
                for each in (tree, newest)
            )
            if found != expected:
                rows.append((path, f"checkpoint {number} has {found}", expected))
    if rows:
        raise RestoreError(
            f"{counted(len(rows), 'leaf', 'differs', 'differ')} from the newest "
            "checkpoint, and cannot be averaged:\n"
            f"{format_rows([('', 'found', 'expected'), *rows])}\n"
            "Merge checkpoints of one run, or remap them to one layout first."
        )
