"""What a strategy costs, from where it keeps each state of training.

Owns the five ways to keep a state along a mesh axis, what follows from them, and the
two conditions without which devices compute something else than one device would.
Invariant: only bytes and axis sizes enter, no implementation. The strategies of the
literature are in `strategies`; what shardkit's own step takes to the byte is said by
`memory`.

References:
    Mehta, Placement Semantics for Distributed Deep Learning (2026).
    Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models (SC 2020).
"""

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping

from shardkit.errors import ConfigError

__all__ = ["Exchange", "Mode", "StateBytes", "Strategy", "Volume"]


class Mode(enum.StrEnum):
    """How the devices along one axis keep a state.

    Attributes:
        REPLICATED: Each has all of it.
        SHARDED: Each has its own part, and never needs another.
        GATHERED: Each keeps its own part, and has one unit (a layer, say) at a time
            whole, where that is used.
        MATERIALISED: Each keeps its own part, and has all of it while a step computes;
            of activations nothing is kept, and they are computed again.
        OFFLOADED: As sharded, with the part in the memory of the host.
    """

    REPLICATED = "replicated"
    SHARDED = "sharded"
    GATHERED = "sharded-with-gather"
    MATERIALISED = "materialised"
    OFFLOADED = "offloaded"


Modes = Mapping[str, Mode]
"""Mesh axis → mode; an axis that is not named replicates."""

STATES = ("params", "grads", "opt_state", "activations")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateBytes:
    """The bytes of a training run, over all devices together and each once.

    Attributes:
        params: Parameters, as the model computes with them.
        grads: Their gradient.
        opt_state: What the optimizer keeps, a copy of the parameters in float32 too.
        activations: What the backward pass needs of all rows computed at once, as far
            as it is cut where the parameters of a layer are.
        whole_activations: The rest: what an axis that cuts layers leaves whole, such
            as norms, unless it cuts the sequence there.
        layer_inputs: The activations where one layer ends and the next begins.
        sums: The results of products over dims that are cut, over one forward pass.
        unit: The parameters of the largest layer.
    """

    params: float = 0.0
    grads: float = 0.0
    opt_state: float = 0.0
    activations: float = 0.0
    whole_activations: float = 0.0
    layer_inputs: float = 0.0
    sums: float = 0.0
    unit: float = 0.0

    @classmethod
    def mixed_adam(cls, num_params: float, **others: float) -> "StateBytes":
        """Adam in mixed precision: 2 Ψ + 2 Ψ + 12 Ψ bytes, as the ZeRO paper counts.

        Example:
            >>> sizes = StateBytes.mixed_adam(7.5e9)
            >>> (sizes.params + sizes.grads + sizes.opt_state) / 1e9
            120.0
        """
        sizes = {"params": 2.0, "grads": 2.0, "opt_state": 12.0}
        return cls(**{k: n * num_params for k, n in sizes.items()} | others)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What one kind of collective exchanges in a step.

    Attributes:
        kind: XLA's name of it.
        axis: Over which mesh axis.
        state: Of what.
        num_bytes: Of the buffers it works on, on one device: what goes in or what
            comes out, whichever is more.
        sent_bytes: What each device sends at least: (n - 1) / n of that, twice for an
            all-reduce.
        num_devices: How many take part: more than the axis has where others add too.
    """

    kind: str
    axis: str
    state: str
    num_bytes: float
    sent_bytes: float
    num_devices: float


@dataclasses.dataclass(frozen=True)
class Volume:
    """What a strategy takes on one device.

    Attributes:
        memory: State → bytes kept on the device all the time.
        passing: State → bytes besides while a step computes.
        host: State → bytes in the memory of the host, for this device.
        exchanges: The collectives of a step.
    """

    memory: dict[str, float]
    passing: dict[str, float]
    host: dict[str, float]
    exchanges: tuple[Exchange, ...]

    @property
    def state_bytes(self) -> float:
        """What is kept of parameters, gradient and optimizer state."""
        return sum(self.memory[state] for state in STATES[:3])

    @property
    def sent_bytes(self) -> float:
        """What the device sends in a step."""
        return sum(exchange.sent_bytes for exchange in self.exchanges)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """Where each state of training is.

    Attributes:
        name: What people call it.
        batch_axes: Devices along these compute different rows.
        params: Of the parameters; sharded means that layers are computed in parts.
        grads: Of the gradient, once it is summed.
        opt_state: Of the optimizer's state.
        activations: Of the activations; sharded where parameters are, the sequence is
            cut between layers.
        summed_over: Over which axes the gradient is summed before the update.

    Raises:
        ConfigError: If devices would compute something else than one device would:
            names the condition and the axis.
    """

    name: str
    batch_axes: tuple[str, ...]
    params: Modes
    grads: Modes
    opt_state: Modes
    activations: Modes = dataclasses.field(default_factory=dict)
    summed_over: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        problems = [*self._lost_gradients(), *self._diverging_states()]
        if problems:
            raise ConfigError(f"{self.name}:" + "".join(f"\n  {x}" for x in problems))

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that it speaks of, those of the batch first."""
        named = [a for state in STATES for a in getattr(self, state)]
        return tuple(dict.fromkeys([*self.batch_axes, *named]))

    def mode(self, state: str, axis: str) -> Mode:
        """How a state is kept along an axis."""
        return getattr(self, state).get(axis, Mode.REPLICATED)

    def _lost_gradients(self) -> Iterator[str]:
        """Gradient integrity: every row counts in every update, and once."""
        summed = self.batch_axes if self.summed_over is None else self.summed_over
        for axis in self.axes:
            if axis in self.batch_axes and axis not in summed:
                yield (
                    f"gradient integrity: devices along {axis!r} compute different "
                    "rows, and their gradients are not summed. Add it to summed_over."
                )
            if axis not in self.batch_axes and axis in summed:
                yield (
                    f"gradient integrity: devices along {axis!r} compute the same "
                    "rows, which would count several times. Take it out of summed_over."
                )

    def _diverging_states(self) -> Iterator[str]:
        """State consistency: copies of the same state get the same updates."""
        whole = (Mode.REPLICATED, Mode.MATERIALISED, Mode.GATHERED)
        for axis in self.axes:
            grads, state = self.mode("grads", axis), self.mode("opt_state", axis)
            if grads != Mode.REPLICATED and state == Mode.REPLICATED:
                yield (
                    f"state consistency: devices along {axis!r} all keep the whole "
                    f"optimizer state, but the gradient is {grads}, so that each would "
                    "update other parts of it. Shard the optimizer state too."
                )
            if self.mode("params", axis) == Mode.SHARDED and axis in self.batch_axes:
                yield (
                    f"state consistency: devices along {axis!r} compute different rows "
                    "with different parts of the parameters. Use "
                    f"{Mode.GATHERED} or {Mode.MATERIALISED}."
                )
            if axis not in self.batch_axes and self.mode("params", axis) in whole[1:]:
                yield (
                    f"state consistency: devices along {axis!r} compute the same rows "
                    "with the same parameters, whose parts would get one update each. "
                    "Make it a batch axis, or shard the parameters."
                )

    def volume(self, sizes: StateBytes, axis_sizes: Mapping[str, int]) -> Volume:
        """Derives memory and communication of one device.

        Args:
            sizes: The bytes of each state.
            axis_sizes: Mesh axis → size; 1 if not named.

        Example:
            >>> cut = {"data": Mode.SHARDED}
            >>> gathered = {"data": Mode.GATHERED}
            >>> zero = Strategy(
            ...     name="ZeRO-3", batch_axes=("data",),
            ...     params=gathered, grads=cut, opt_state=cut,
            ... )
            >>> volume = zero.volume(StateBytes.mixed_adam(7.5e9), {"data": 64})
            >>> volume.state_bytes / 1e9
            1.875
        """
        count = {axis: axis_sizes.get(axis, 1) for axis in self.axes}
        cut = {state: self._cut(state, count) for state in STATES}
        memory: dict[str, float] = {}
        passing: dict[str, float] = {}
        host: dict[str, float] = {}
        for state in STATES[:3]:
            kept, modes = getattr(sizes, state) / cut[state], getattr(self, state)
            is_away = Mode.OFFLOADED in modes.values()
            memory[state], host[state] = (0.0, kept) if is_away else (kept, 0.0)
            passing[state] = 0.0
            if Mode.MATERIALISED in modes.values():
                whole = self._cut(state, count, without=Mode.MATERIALISED)
                passing[state] = getattr(sizes, state) / whole
            elif Mode.GATHERED in modes.values():
                passing[state] = sizes.unit / self._cut(state, count, Mode.GATHERED)
        kept, again, away = self._activations(sizes, count)
        memory["activations"], passing["activations"] = kept, again
        host["activations"] = away
        exchanges = [x for x in self._exchanges(sizes, count) if x.sent_bytes]
        return Volume(memory, passing, host, tuple(exchanges))

    def _cut(
        self, state: str, count: Mapping[str, int], without: Mode | None = None
    ) -> int:
        """Into how many parts a state is cut, but for axes of one mode."""
        spared = (Mode.REPLICATED, without)
        return math.prod(
            n for a, n in count.items() if self.mode(state, a) not in spared
        )

    def _activations(
        self, sizes: StateBytes, count: Mapping[str, int]
    ) -> tuple[float, float, float]:
        """Bytes kept, bytes while a layer is computed again, and bytes on the host."""
        rows = math.prod(count[axis] for axis in self.batch_axes)
        layers = [a for a in count if self.mode("params", a) == Mode.SHARDED]
        sequence = [a for a in layers if self.mode("activations", a) != Mode.REPLICATED]
        inside = rows * math.prod(count[a] for a in layers)
        between = rows * math.prod(count[a] for a in sequence)
        whole = sizes.activations / inside + sizes.whole_activations / between
        modes = self.activations.values()
        if Mode.OFFLOADED in modes:
            return 0.0, 0.0, whole
        if Mode.MATERIALISED not in modes:
            return whole, 0.0, 0.0
        # One layer at a time is computed again, from what went into it.
        share = sizes.unit / sizes.params if sizes.params else 1.0
        return sizes.layer_inputs / between, whole * share, 0.0

    def _exchanges(
        self, sizes: StateBytes, count: Mapping[str, int]
    ) -> Iterator[Exchange]:
        cut = math.prod(
            n
            for a, n in count.items()
            if a not in self.batch_axes and self.mode("params", a) == Mode.SHARDED
        )
        params, grads = sizes.params / cut, sizes.grads / cut
        # The axes that cut come first, so that those that do not exchange less.
        order = sorted(
            self.batch_axes, key=lambda a: self.mode("grads", a) == "replicated"
        )
        for axis in order:
            n, mode = count[axis], self.mode("params", axis)
            times = {Mode.GATHERED: 2, Mode.MATERIALISED: 1}.get(mode, 0)
            if mode == Mode.REPLICATED and self.mode("opt_state", axis) != mode:
                times = 1
            yield _exchange("all-gather", axis, "params", times * params, n)
            # An optimizer that is sharded needs its part of the sum only.
            is_whole = self.mode("opt_state", axis) == Mode.REPLICATED
            kind = "all-reduce" if is_whole else "reduce-scatter"
            yield _exchange(kind, axis, "grads", grads, n)
            if self.mode("grads", axis) != Mode.REPLICATED:
                params, grads = params / n, grads / n
        rows = math.prod(count[axis] for axis in self.batch_axes)
        for axis in count:
            if axis in self.batch_axes or self.mode("params", axis) != Mode.SHARDED:
                continue
            # Forwards once, and backwards once.
            num_bytes = 2 * sizes.sums / rows
            if self.mode("activations", axis) == Mode.REPLICATED:
                yield _exchange(
                    "all-reduce", axis, "activations", num_bytes, count[axis]
                )
                continue
            for kind in ("all-gather", "reduce-scatter"):
                yield _exchange(kind, axis, "activations", num_bytes, count[axis])


def _exchange(kind: str, axis: str, state: str, num_bytes: float, n: int) -> Exchange:
    times = 2 if kind == "all-reduce" else 1
    sent_bytes = times * num_bytes * (n - 1) / n
    return Exchange(kind, axis, state, num_bytes, sent_bytes, n)
