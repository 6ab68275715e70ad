"""The training loop that survives changes of its devices.

Owns `Trainer`: when to step, to reconfigure, to evaluate, to save and to stop. It
computes nothing itself. Invariant: the state, the data cursor and the step are one;
whatever happens, the run goes on at the step where the state stands.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax
from jax import Array

from shardkit.checkpoint import CheckpointConfig, Checkpoints
from shardkit.data import check_batch
from shardkit.digest import combine_digests
from shardkit.elastic import Placements, Transition, ask, wait_for
from shardkit.errors import (
    ConfigError,
    LostStateError,
    MembershipError,
    Preempted,
)
from shardkit.evaluation import EvalConfig, evaluate
from shardkit.events import EventLog
from shardkit.logical_axes import AxisRules
from shardkit.membership import Change, Membership, scripted
from shardkit.mesh import MeshSpec, device_ids
from shardkit.metrics import Pending, StepMetrics
from shardkit.placement import Placement
from shardkit.prefetch import Prefetcher
from shardkit.recipe import LossScale, Recipe
from shardkit.state import TrainState

__all__ = ["Trainer"]


class Trainer:
    """Trains on the devices there are, and goes on when they change.

    Args:
        init: `key → params`; any tree of arrays, annotated with logical axes.
        loss: `(params, microbatch, key) → scalar or LossOutput`; ordinary
            single-device code.
        tx: Any optax transformation.
        data: `step → global batch`, a tree of arrays with the examples in dim 0.
        mesh: The mesh that is asked for.
        axis_rules: Logical axis → mesh axis.
        num_microbatches: Into how many equal parts the global batch is cut.
        seed: The seed of everything random.
        eval_loss: The loss for evaluation; None for `loss`.
        consistency: `"exact"` keeps every bit whatever the device count; `"fast"`
            lets sums be taken in any order.
        certify: At which changes a step is computed on both placements and compared:
            `"always"`, `"first"` (the first use of a placement) or `"off"`.
        on_failed_certificate: `"stop"`, or `"continue"` with a notice.
        checkpoint: Where and when to save; None for never.
        eval: On what and when to evaluate; None for never.
        ema: Decay of an average of the parameters, to evaluate with; None for none.
        loss_scale: How the loss is scaled, or None.
        path_rules: Glob over leaf paths → logical axes, for unannotated leaves.
        strict: Whether unannotated leaves and unused rules are errors.
        devices: The pool; None for all devices.
        events: Where events are sent.
        manifest: JSON facts that a checkpoint must share to be restored.

    Raises:
        ShardkitError: If these do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> def init(key):
        ...     return {"w": jax.random.normal(key, (4,))}
        >>> def loss(params, microbatch, key):
        ...     return jnp.mean((microbatch["x"] @ params["w"] - 1) ** 2)
        >>> def data(step):
        ...     return {"x": np.random.default_rng(step).normal(size=(8, 4))}
        >>> trainer = Trainer(
        ...     init=init, loss=loss, tx=optax.sgd(0.1), data=data, num_microbatches=4
        ... )
        >>> [m.step for m in trainer.run(steps=3)]
        [0, 1, 2]
    """

    def __init__(
        self,
        *,
        init: Callable[[Any], Any],
        loss: Callable[[Any, Any, Any], Any],
        tx: optax.GradientTransformation,
        data: Callable[[int], Any],
        mesh: MeshSpec | None = None,
        axis_rules: AxisRules | None = None,
        num_microbatches: int,
        seed: int = 0,
        eval_loss: Callable[[Any, Any, Any], Any] | None = None,
        consistency: str = "exact",
        certify: str = "first",
        on_failed_certificate: str = "stop",
        checkpoint: CheckpointConfig | None = None,
        eval: EvalConfig | None = None,
        ema: float | None = None,
        loss_scale: LossScale | None = None,
        path_rules: Mapping[str, tuple[str | None, ...]] | None = None,
        strict: bool = False,
        devices: Sequence[Any] | None = None,
        events: EventLog | None = None,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        _check_choice("consistency", consistency, ("exact", "fast"))
        _check_choice("certify", certify, ("always", "first", "off"))
        _check_choice(
            "on_failed_certificate", on_failed_certificate, ("stop", "continue")
        )
        self.events = events or EventLog()
        self._recipe = Recipe(
            init=init,
            loss=loss,
            tx=tx,
            num_microbatches=num_microbatches,
            seed=seed,
            eval_loss=eval_loss,
            exact=consistency == "exact",
            ema=ema,
            loss_scale=loss_scale,
        )
        self._certify = certify if consistency == "exact" else "off"
        self._continue_uncertified = on_failed_certificate == "continue"
        self._eval = eval
        known = {"seed": seed, "consistency": consistency, "grid": num_microbatches}
        self._manifest = {**known, **(manifest or {})}
        self._layout, warnings = self._recipe.layout(
            axis_rules or {}, path_rules=path_rules, strict=strict
        )
        for warning in warnings:
            self.events.emit("notice", message=warning)
        self._pool = list(jax.devices() if devices is None else devices)
        batch = data(0)
        check_batch(batch, num_microbatches=num_microbatches, where="data(0)")
        self._placements = Placements(
            self._recipe,
            self._layout,
            mesh or MeshSpec(),
            self._pool,
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch),
            self.events,
        )
        self._prefetcher = Prefetcher(data)
        self._checkpoint = checkpoint
        self._checkpoints = Checkpoints(checkpoint) if checkpoint else None
        self._record: dict[str, Any] | None = None
        self._live: tuple[Placement, TrainState] | None = None
        self._step = 0
        self._certified: set[tuple[int, ...]] = set()

    @property
    def step(self) -> int:
        """How many steps are done; the index of the next one."""
        return self._step

    @property
    def compiles(self) -> dict[str, int]:
        """How often each program has been compiled."""
        return self._placements.compiles()

    @property
    def state(self) -> TrainState:
        """The state as global arrays without padding, valid until the next step."""
        placement, state = self._start()
        return placement.logical(state)

    def run(
        self, steps: int, membership: Membership | None = None
    ) -> Iterator[StepMetrics]:
        """Trains until `steps` steps are done, yielding each one step behind.

        Args:
            steps: The absolute end, not a number of further steps.
            membership: Who asks for device changes.

        Raises:
            Preempted: After saving, when asked to leave.
            CertificateError: If a change altered bits.
            NonFiniteError: If the loss is not finite.
            LostStateError: If shards were lost and there is no checkpoint.
        """
        membership = membership or scripted({})
        membership.check(len(self._pool))
        if jax.process_count() > 1 and not membership.is_shared:
            raise MembershipError(
                "several processes must change at the same step, which signals and "
                "watched files cannot promise; use sk.scripted there"
            )
        stop = membership.start()
        try:
            yield from self._run(steps, membership)
        finally:
            stop()

    def _run(self, steps: int, membership: Membership) -> Iterator[StepMetrics]:
        def give_up() -> None:
            if membership.leaving():
                self._leave()

        pending = Pending(check_gradients=self._recipe.loss_scale is None)
        while self._step < steps:
            count = self._live[0].num_devices if self._live else len(self._pool)
            change = ask(membership, self._step, count, self._pool, self.events)
            wanted = change.num_devices or count
            moves = self._live is not None and wanted != count
            if moves or change.leave:
                yield from pending.flush()
            self._start(wanted)
            if change.leave:
                self._leave()
            metrics = self._reconfigure(wanted, change, give_up) if moves else None
            if metrics is None:
                metrics = self._execute(give_up)
            yield from pending.push(self._step - 1, self._start()[0], metrics)
            if self._eval and self._is_due(self._eval.every):
                yield from pending.flush()
                self.evaluate(interrupted=give_up)
            if self._checkpoint and self._is_due(self._checkpoint.every):
                yield from pending.flush()
                self.save()
        yield from pending.flush()

    def _is_due(self, every: int) -> bool:
        return every > 0 and self._step % every == 0

    def _start(self, num_devices: int | None = None) -> tuple[Placement, TrainState]:
        """Puts the state on devices if it is not on any: fresh, or restored."""
        if self._live is None:
            placement = self._placements.on(num_devices or len(self._pool))
            if self._record is None:
                state = placement.init()
            else:
                state = self._saved().load(self._record, placement)
            self._live = placement, state
        return self._live

    def _execute(self, give_up: Callable[[], None]) -> dict[str, Array]:
        """Runs one step where the state is."""
        placement, state = self._start()
        is_first = not placement.is_compiled
        if is_first:
            wait_for(placement.compile, give_up)
        state, metrics = placement.step(state, self._prefetcher.get(self._step))
        # State and step move together, before anybody sees either.
        self._live, self._step = (placement, state), self._step + 1
        if is_first and placement.not_donated:
            names = ", ".join(placement.not_donated)
            message = f"not donated, so that they exist twice during a step: {names}"
            self.events.emit("notice", message=message)
        return metrics

    def _reconfigure(
        self, num_devices: int, change: Change, give_up: Callable[[], None]
    ) -> dict[str, Array] | None:
        """Moves to another placement; returns the metrics of a step if it did one."""
        old, before = self._start()
        new = self._placements.on(num_devices)
        transition = Transition(old, new)
        old_ids, new_ids = device_ids(old.mesh), device_ids(new.mesh)
        lost = frozenset(old_ids) - frozenset(new_ids) if change.lost else frozenset()
        certify = not lost and (
            self._certify == "always"
            or (self._certify == "first" and new_ids not in self._certified)
        )
        with transition.phase("compile"):
            if not new.is_compiled:
                wait_for(new.compile, give_up)
        try:
            after = transition.move(before, lost=lost, keep_source=certify)
        except LostStateError as error:
            self._rewind(new, error, transition)
            certify = False
        else:
            self._live = self._live if certify else (new, after)
        if not certify:
            self.events.emit("reconfigure", **transition.report(self._step, None))
            return None
        step, batch = self._step, self._prefetcher.get(self._step)
        stayed, moved, metrics, differing = transition.certify(before, after, batch)
        if differing:
            self._live, self._step = (old, stayed), step + 1
            failure = transition.failure(differing, step)
            if not self._continue_uncertified:
                raise failure
            self.events.emit("notice", message=str(failure))
        self._live, self._step = (new, moved), step + 1
        self._certified |= {old_ids, new_ids}
        self.events.emit("reconfigure", **transition.report(step, not differing))
        return metrics

    def _rewind(
        self, new: Placement, error: LostStateError, transition: Transition
    ) -> None:
        """Goes back to the newest checkpoint, since shards are gone."""
        if self._checkpoints is None or not self._checkpoints.steps():
            raise error
        with transition.phase("restore"):
            record = self._checkpoints.record()
            state = self._checkpoints.load(record, new)
        repeated = self._step - record["step"]
        self._live, self._step = (new, state), record["step"]
        self.events.emit("rewind", step=self._step, repeats=repeated)
        message = f"lost shards: step {self._step} restored, {repeated} to repeat"
        self.events.emit("notice", message=message)

    def evaluate(
        self, *, interrupted: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Evaluates on the fixed set, to the same bits on every mesh.

        Raises:
            ConfigError: If the trainer was made without `eval`.
        """
        if self._eval is None:
            raise ConfigError("Trainer.evaluate: made without eval=EvalConfig(...)")
        placement, state = self._start()
        result = evaluate(self._eval, placement, state, self._step, interrupted)
        self.events.emit("eval", step=self._step, **result)
        return result

    def state_digest(self) -> str:
        """Digests the logical state; the same on every mesh."""
        placement, state = self._start()
        return combine_digests(placement.digest(state), self._layout)

    def save(self) -> None:
        """Saves the state now.

        Raises:
            ConfigError: If the trainer was made without `checkpoint`.
        """
        checkpoints = self._saved()
        placement, state = self._start()
        if self._step not in checkpoints.steps():
            digests = placement.digest(state)
            checkpoints.save(self._step, state, placement, digests, self._manifest)
        self.events.emit("checkpoint", step=self._step)

    def restore(self, step: int | None = None) -> int:
        """Goes to a saved step, the newest by default, on whatever devices are there.

        The state is read when it is first needed, onto the mesh that it is needed on.

        Returns:
            The step.

        Raises:
            RestoreError: If there is none, or it is of another run.
            ConfigError: If the trainer was made without `checkpoint`.
        """
        checkpoints = self._saved()
        record = checkpoints.record(step)
        changed = checkpoints.check(record, self._manifest)
        if changed and self._recipe.exact:
            message = "bits may differ from the run that saved: " + ", ".join(changed)
            self.events.emit("notice", message=message)
        checkpoints.go_back(record["step"])
        self._record, self._live = record, None
        self._step = record["step"]
        return self._step

    def close(self) -> None:
        """Ends background work; a second call does nothing."""
        self._prefetcher.close()
        if self._checkpoints is not None:
            self._checkpoints.close()
            self._checkpoints = None

    def _saved(self) -> Checkpoints:
        if self._checkpoints is None:
            raise ConfigError(
                "Trainer: made without checkpoint=CheckpointConfig(...), so it can "
                "neither save nor restore"
            )
        return self._checkpoints

    def _leave(self) -> None:
        """Saves if there is where to, and stops."""
        if self._checkpoints is None:
            raise Preempted(
                f"asked to leave before step {self._step}; nothing is saved, since the "
                "trainer was made without checkpoint=…"
            )
        self.save()
        raise Preempted(f"asked to leave; step {self._step} is saved")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"Trainer: {name} must be one of {', '.join(map(repr, choices))}, "
            f"found {value!r}"
        )
