"""The order of things while a run goes on.

Owns when to step, to reconfigure, to evaluate, to save, to halt and to leave.
Invariant: nothing that may end the run is begun before all finished steps have been
told. How any of these is done is the controller's business.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import jax

from shardkit.controller import Controller
from shardkit.elastic import ask
from shardkit.leaving import halt, save_and_leave
from shardkit.membership import Membership
from shardkit.mesh import check_no_mesh_is_set
from shardkit.metrics import Pending, StepMetrics
from shardkit.probe import SpeedProbe
from shardkit.waits import GivenUp

__all__ = ["train"]


def train(
    controller: Controller,
    steps: int,
    membership: Membership,
    pending: Pending,
    due: Mapping[Callable[[], Any], int],
    probe: SpeedProbe | None = None,
) -> Generator[StepMetrics, None, None]:
    """Trains until `steps` steps are done; see `Trainer.run`.

    Signals are heard while a step is made. What the caller does between two of them is
    never given up.

    Args:
        controller: Holds the state.
        steps: The absolute end.
        membership: Who asks for changes.
        pending: What holds steps back until the next one is under way.
        due: What is to be done after every so many steps, in this order.
        probe: What measures this process beside the steps, or None.

    Raises:
        ConfigError: If `jax.set_mesh` has made another mesh the current one; and what
            `Trainer.run` names.
    """
    check_no_mesh_is_set()
    made = _steps(controller, steps, membership, pending, due, probe)
    metrics = _until_given_up(controller, pending, made)
    try:
        while True:
            with controller.waiter.listening(membership.leaving):
                found = next(metrics, None)
            if found is None:
                return
            yield found
    finally:
        metrics.close()


def _until_given_up(
    controller: Controller, pending: Pending, steps: Iterator[StepMetrics]
) -> Generator[StepMetrics, None, None]:
    try:
        yield from steps
    except GivenUp:
        # Only what has been looked at is saved.
        yield from pending.flush()
        save_and_leave(controller)


def _steps(
    controller: Controller,
    steps: int,
    membership: Membership,
    pending: Pending,
    due: Mapping[Callable[[], Any], int],
    probe: SpeedProbe | None,
) -> Iterator[StepMetrics]:
    placements, events = controller.placements, controller.events
    controller.headcount.end = steps
    while controller.step < steps:
        asked, count = controller.num_asked, controller.num_devices
        change = ask(membership, controller.step, asked, placements, events)
        if change.leave:
            raise GivenUp
        if change.halt:
            yield from pending.flush()
            halt(controller)
        change = controller.next_change(change)
        wanted = change.num_devices or count
        present = controller.live and controller.live[0]
        moves = wanted != count and controller.moves_to(wanted)
        if moves or (present is not None and not present.is_compiled):
            # Neither a move nor a compilation is a part of a step's time.
            yield from pending.flush()
        controller.start(wanted)
        if controller.is_resumed:
            controller.is_resumed = False
            yield from _do_what_is_due(controller, pending, due)
        if probe is not None:
            probe(controller.step, *controller.start())
        metrics = controller.reconfigure(wanted, change) if moves else None
        if metrics is None:
            metrics = _first_step(controller) if moves else controller.advance()
        placement, _ = controller.start()
        yield from pending.push(controller.step - 1, placement, metrics)
        yield from _do_what_is_due(controller, pending, due)
    yield from pending.flush()
    controller.wait_for_saves()


def _do_what_is_due(
    controller: Controller, pending: Pending, due: Mapping[Callable[[], Any], int]
) -> Iterator[StepMetrics]:
    for do, every in due.items():
        if every > 0 and controller.step > 0 and controller.step % every == 0:
            yield from pending.flush()
            do()


def _first_step(controller: Controller) -> dict[str, jax.Array]:
    """Runs the step after a change, and waits for it, to tell how long it took."""
    with controller.events.phase("first_step", step=controller.step):
        return jax.block_until_ready(controller.advance())
