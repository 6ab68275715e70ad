"""The training loop that survives changes of its devices.

Owns `Trainer`: what a user gives and gets, and when to step, to reconfigure, to
evaluate, to save and to stop. The state itself is the controller's.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from shardkit.arguments import check_choice
from shardkit.batch import abstract_batch, checked_data
from shardkit.checkpoint.config import CheckpointConfig
from shardkit.checkpoint.history import open_history
from shardkit.checkpoint.remap import Remap
from shardkit.controller import Controller
from shardkit.errors import ConfigError
from shardkit.evaluation import EvalConfig, check_other, check_weights, evaluate
from shardkit.events import EventLog
from shardkit.functions import check_functions
from shardkit.layout import LeafLayout
from shardkit.logical_axes import AxisRules
from shardkit.loop import train
from shardkit.membership import Membership, check_source, scripted
from shardkit.mesh import MeshSpec
from shardkit.metrics import Pending, StepMetrics
from shardkit.microbatch import checked_speeds
from shardkit.placements import Placements
from shardkit.planner.auto_mesh import AutoMesh, check_mesh
from shardkit.planner.chooser import mesh_chooser
from shardkit.prefetch import Prefetcher
from shardkit.probe import SpeedProbe
from shardkit.program_report import ProgramReport
from shardkit.ramp import BatchRamp
from shardkit.recipe import LossScale, Recipe
from shardkit.snapshot.config import SnapshotConfig
from shardkit.snapshot.snapshots import open_snapshots
from shardkit.standby import Standby, check_counts
from shardkit.state import TrainState
from shardkit.state_layout import lay_out
from shardkit.waits import Waiter

__all__ = ["Trainer"]


class Trainer:
    """Trains on the devices there are, and goes on when they change.

    Args:
        init: `key → params`; any tree of arrays, annotated with logical axes. Or `key →
            Variables`, for a model with a state beside its parameters.
        loss: `(params, microbatch, key) → scalar or LossOutput`; ordinary
            single-device code. With a state, `(params, state, microbatch, key) →
            LossOutput`, which has the next one in it.
        tx: Any optax transformation.
        data: `step → global batch`, arrays in a dict, nested or not, with the
            examples in dim 0.
        mesh: The mesh that is asked for; `"auto"`, or an `sk.AutoMesh`, has it chosen.
        axis_rules: Logical axis → mesh axis.
        num_microbatches: Into how many equal parts the global batch is cut; or an
            `sk.BatchRamp`, which says so for every step. Parts keep their size.
        seed: The seed of everything random.
        eval_loss: The loss for evaluation, without dropout; None for `loss`.
        consistency: `"exact"` keeps every bit whatever the device count; `"fast"`
            lets sums be taken in any order.
        certify: At which changes a step is computed on both placements and compared:
            `"always"`, `"first"` (the first use of a placement) or `"off"`.
        on_failed_certificate: `"stop"`, or `"continue"` with a notice.
        checkpoint: Where and when to save; None for never.
        snapshot: When to copy it to host memory, to survive lost devices; None: never.
        eval: On what and when to evaluate; None for never.
        ema: Decay of an average of the parameters, to evaluate with; None for none.
        loss_scale: How the loss is scaled, or None.
        combine: Glob over paths of the model's state → how what the microbatches of a
            step leave there becomes one: `"mean"`, which floats have anyway, `"sum"` of
            all changes, or `"last"`. All microbatches begin with the same state.
        noise_scale: Whether each step measures the gradient noise scale, in the metrics
            `noise_scale`, `noise_trace` and `grad_square` (see `shardkit.noise`).
        offload: Whether the optimizer's state is in host memory but for its update.
        path_rules: Glob or compiled regex over leaf paths → logical axes or a
            `PartitionSpec`; the first that fits. What a leaf's own annotation says
            otherwise is an error.
        strict: Whether unannotated leaves and unused rules are errors.
        devices: The pool; None for all devices.
        standby: How many placements are compiled ahead of changes, over the whole run.
        standby_counts: Device counts of which to think first, after a script's.
        speeds: Device id → relative speed; slow ones compute fewer microbatches.
        probe: What measures between steps how fast this process is; None for nothing.
        events: Where events are sent; None for a log of its own. Notices to which
            nobody listens go to the logger `shardkit`.
        manifest: JSON facts that a checkpoint must share to be restored.

    Raises:
        ShardkitError: If these do not fit together.

    Example:
        >>> import jax.numpy as jnp, numpy as np
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
        loss: Callable[..., Any],
        tx: optax.GradientTransformation,
        data: Callable[[int], Any],
        mesh: MeshSpec | AutoMesh | str | None = None,
        axis_rules: AxisRules | None = None,
        num_microbatches: int | BatchRamp,
        seed: int = 0,
        eval_loss: Callable[..., Any] | None = None,
        consistency: str = "exact",
        certify: str = "first",
        on_failed_certificate: str = "stop",
        checkpoint: CheckpointConfig | None = None,
        snapshot: SnapshotConfig | None = None,
        eval: EvalConfig | None = None,
        ema: float | None = None,
        loss_scale: LossScale | None = None,
        combine: Mapping[str, str] | None = None,
        noise_scale: bool = False,
        offload: bool = False,
        path_rules: Mapping[Any, Any] | None = None,
        strict: bool = False,
        devices: Sequence[Any] | None = None,
        standby: int = 0,
        standby_counts: Sequence[int] = (),
        speeds: Mapping[int, float] | None = None,
        probe: SpeedProbe | None = None,
        events: EventLog | None = None,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        noticed = check_functions(init, loss, eval_loss, tx, data)
        asked = check_mesh(mesh)
        check_choice("consistency", consistency, ("exact", "fast"))
        check_choice("certify", certify, ("always", "first", "off"))
        then = ("stop", "continue")
        check_choice("on_failed_certificate", on_failed_certificate, then)
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
            combine=combine or {},
            noise_scale=noise_scale,
            offload=offload,
        )
        self._eval, self._checkpoint, self._probe = eval, checkpoint, probe
        rules: Any = {"axis_rules": axis_rules or {}, "path_rules": path_rules}
        self._layout, warnings, _ = lay_out(self._recipe, **rules, strict=strict)
        for warning in [*warnings, *noticed]:
            self.events.emit("notice", message=warning)
        pool = list(jax.devices() if devices is None else devices)
        check_counts(standby_counts, len(pool), max_programs=standby)
        ramp = self._recipe.ramp
        like, rows, checked = checked_data(data, ramp)
        waiter = Waiter()
        known = {"seed": seed, "consistency": consistency, "grid": ramp.record}
        if eval is not None:
            check_weights(eval, self._recipe, self._layout)
        certify = certify if consistency == "exact" else "off"
        placements = Placements(
            self._recipe,
            self._layout,
            mesh_chooser(asked, self._recipe, like, pool, rules),
            pool,
            like,
            abstract_batch(eval.data(0)) if eval else like,
            self.events,
            waiter,
            certifies=certify,
            speeds=checked_speeds(speeds or {}),
            stages=snapshot is not None,
        )
        ahead = Standby(placements, max_programs=standby, configured=standby_counts)
        self._controller = Controller(
            placements=placements,
            data=checked,
            history=open_history(
                checkpoint,
                {**known, **(manifest or {})},
                rows=rows,
                corpus_digest=getattr(data, "digest", None),
                events=self.events,
                begins=snapshot is None or snapshot.store is None,
            ),
            certify=certify,
            stop_on_failure=on_failed_certificate == "stop",
            events=self.events,
            waiter=waiter,
            standby=ahead if standby else None,
            snapshots=open_snapshots(snapshot, self.events),
        )
        self._eval_data = Prefetcher(eval.data) if eval else None

    @property
    def step(self) -> int:
        """How many steps are done; the index of the next one."""
        return self._controller.step

    @property
    def compiles(self) -> dict[str, int]:
        """How often each program has been compiled."""
        return self._controller.placements.compiles()

    def inspect(self, num_devices: int | None = None) -> dict[str, ProgramReport]:
        """Reports what the programs of a device count cost, compiling if need be.

        Args:
            num_devices: How many; None for where the run is, or would begin.

        Returns:
            Work, memory and collectives of `"step"` and, where the trainer evaluates,
            of `"evaluate"`; each prints as a table.

        Raises:
            MembershipError: If the pool has too few.
        """
        controller = self._controller
        return controller.placements.inspect(num_devices or controller.num_devices)

    @property
    def layout(self) -> list[LeafLayout]:
        """Every leaf of the state, and the dim of it that `fsdp` cuts on any mesh."""
        return jax.tree.leaves(self._layout)

    @property
    def saved_steps(self) -> list[int]:
        """The steps that `restore` can go to, oldest first."""
        return self._controller.saved_steps

    @property
    def state(self) -> TrainState:
        """The state as global arrays without padding, valid until the next step."""
        placement, state = self._controller.start()
        return placement.logical(state)

    def run(
        self, steps: int, membership: Membership | None = None
    ) -> Iterator[StepMetrics]:
        """Trains until `steps` steps are done, yielding each one step behind.

        A step is yielded when the next one is under way, so that nothing waits for
        its loss. Leaving the loop early therefore leaves the state a step further on.

        A change that is asked for with notice (by a signal, or in a file) is made at
        the first step for which its program is ready, or when its grace is over; steps
        go on as before until then, while the program is compiled in a thread.

        Args:
            steps: The absolute end, not a number of further steps.
            membership: Who asks for device changes.

        Raises:
            Preempted: After saving, when asked to leave.
            Halted: With the state in a snapshot, when asked to halt.
            CertificateError: If a change altered bits.
            NonFiniteError: If the loss is not finite.
            LostStateError: If shards were lost and are in no snapshot or checkpoint.
            ConfigError: If `jax.set_mesh` has made another mesh the current one.
        """
        controller = self._controller
        membership = scripted({}) if membership is None else membership
        check_source(membership, len(controller.placements.pool), jax.process_count())
        controller.foresight.scripted = membership.expected()
        stop = membership.start()
        due: dict[Callable[[], Any], int] = {}
        if self._eval:
            due[self.evaluate] = self._eval.every
        if self._checkpoint:
            due[functools.partial(self.save, wait=False)] = self._checkpoint.every
        pending = Pending(check_gradients=self._recipe.loss_scale is None)
        try:
            yield from train(controller, steps, membership, pending, due, self._probe)
        finally:
            stop()

    def evaluate(self, on: EvalConfig | None = None) -> dict[str, float]:
        """Evaluates on a fixed set, to the same bits on every mesh.

        Args:
            on: Another set than the trainer's own, of which no event tells; when it is
                due does not matter.

        Raises:
            ConfigError: If there is neither `on` nor the trainer's `eval`, or the loss
                does not read the weights of a `FixedSet`.
        """
        if on is not None:
            placement, state = self._controller.start()
            check_other(on, placement)
            return evaluate(on, placement, state, self.step, on.data)
        if self._eval is None or self._eval_data is None:
            raise ConfigError("Trainer.evaluate: made without eval=EvalConfig(...)")
        placement, state = self._controller.start()
        check = self._controller.waiter.check
        get = functools.partial(self._eval_data.get, check=check)
        with self.events.phase("eval", step=self.step) as fields:
            result = evaluate(self._eval, placement, state, self.step, get)
            fields.update(result)
        self._controller.metrics = result
        return result

    def state_digest(self) -> str:
        """Digests the logical state; the same on every mesh."""
        return self._controller.digest()

    def save(self, *, wait: bool = True) -> None:
        """Saves the state now.

        Args:
            wait: Whether to return only when it is committed; the next save will wait.

        Raises:
            ConfigError: If the trainer was made without `checkpoint`.
        """
        self._controller.save(wait=wait)

    def restore(
        self,
        step: int | None = None,
        remap: Remap | None = None,
        source: str | Path | None = None,
    ) -> int:
        """Goes to a saved step on whatever devices are there, and returns it.

        The state is read, and verified block by block, when it is first needed. If the
        newest is damaged and no certain step was asked for, the run goes on from the
        newest that is whole, and a notice says so.

        Args:
            step: Which; the newest by default.
            remap: Rules that make this run's state of what another layout, or another
                library, has saved. The checkpoint may then be of another run.
            source: Whose checkpoint a new run begins from, if not its own.

        Raises:
            RestoreError: If there is none, or it is of another run.
            ConfigError: If the trainer was made without `checkpoint`.
        """
        return self._controller.restore(step, remap, source)

    def go_on(self) -> int:
        """Goes to the newest snapshot of an earlier process of this very run.

        When its state is first needed and read, the event `"last_steps"` tells of the
        steps before it, since that process may not have come to.

        Returns:
            The step; 0 if there is none.
        """
        return self._controller.go_on()

    def ready(self) -> None:
        """Compiles, or loads, what the first step on all devices needs.

        Where the batch ramps that is the step of any phase, as it is not known yet from
        which step the run goes on.
        """
        placement = self._controller.placements.on(self._controller.num_devices)
        for start, _ in self._recipe.ramp.phases:
            placement.at(start).compile()
        placement.meet()

    def wait_for_standby(self, timeout_s: float) -> bool:
        """Waits until nothing is made ready, as runs never do; whether in time."""
        return self._controller.wait_for_standby(timeout_s)

    def close(self) -> None:
        """Ends background work; a second call does nothing."""
        self._controller.close()
        if self._eval_data is not None:
            self._eval_data.close()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
