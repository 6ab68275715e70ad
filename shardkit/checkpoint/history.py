"""What a run does with its checkpoints: saves, and goes back to what is whole.

Owns which step a run goes on from, and which ones are its own. Invariant: nothing is
live before it is verified; and where no certain step was asked for, a damaged one is
passed over for the newest that is whole, which is told.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardkit.checkpoint.config import CheckpointConfig
from shardkit.checkpoint.inputs import check_remap, checked_path, step_number
from shardkit.checkpoint.manager import (
    Checkpoints,
    Facts,
    agreed,
    check_run,
    load,
    wanted_views,
)
from shardkit.checkpoint.reader import Saved, open_checkpoint, saved_steps
from shardkit.checkpoint.remap import Remap
from shardkit.checkpoint.sums import check_sums
from shardkit.errors import DamagedError, RestoreError, SaveError
from shardkit.events import EventLog
from shardkit.mesh import GROUP_AXES, consistency_class
from shardkit.placement import Placement
from shardkit.ramp import BatchRamp, as_ramp

__all__ = ["History", "open_history"]


class History:
    """The saved steps of one run.

    Args:
        checkpoints: Where they are.
        run: What a checkpoint must share to be restored.
        random: How the run makes its keys; for information.
        rows: How many each global batch has: with the step, where the data goes on.
        corpus: The digest of the data, if it has one.
        events: Where what happens is told.
        exact: Whether the run promises its bits.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        run: Mapping[str, Any],
        random: Mapping[str, Any],
        rows: BatchRamp,
        corpus: Mapping[str, Any],
        events: EventLog,
        *,
        exact: bool,
    ) -> None:
        self._checkpoints, self._events, self._exact = checkpoints, events, exact
        self._run, self._random = dict(run), dict(random)
        self._rows, self._corpus = rows, dict(corpus)
        self._chosen: Saved | None = None
        self._is_certain, self._remap = False, None
        self._own: set[int] = set()

    @property
    def directory(self) -> Path:
        """Where the checkpoints are."""
        return self._checkpoints.directory

    def steps(self) -> list[int]:
        """The steps that can be gone back to, oldest first."""
        return self._checkpoints.steps()

    @property
    def mesh(self) -> Mapping[str, int] | None:
        """Mesh axis → size, where this run was when it saved the chosen step."""
        if self._chosen is None or self._remap is not None or not self._own:
            return None
        manifest = self._chosen.manifest
        found = {} if manifest is None else manifest.mesh
        # It comes from a file.
        return {a: n for a, n in found.items() if type(n) is int and n > 0} or None

    def save(
        self,
        step: int,
        state: Any,
        placement: Placement,
        *,
        metrics: Mapping[str, float],
        wait: bool,
    ) -> None:
        """Saves the state, unless this run has saved this very step already.

        Raises:
            RestoreError: If another run has saved there meanwhile.
            SaveError: If it, or the one before, could not be saved.
        """
        if step not in self._own:
            if step in self._checkpoints.steps():
                raise RestoreError(
                    f"{self._checkpoints.directory}: step {step} has been saved by "
                    "another run meanwhile. Give every run a directory of its own."
                )
            position = {
                "next_step": step,
                "examples": self._rows.before(step),
                "rows": self._rows(step),
            }
            facts = Facts(
                run=self._run,
                data={**position, **self._corpus},
                random=self._random,
                metrics=metrics,
            )
            with self._failing():
                self._checkpoints.save(step, state, placement, facts)
            self._own.add(step)
        if wait:
            self.wait()

    def choose(
        self, step: int | None, remap: Remap | None = None, source: Any = None
    ) -> int:
        """Chooses the step to go on from, the newest by default; nothing is read yet.

        Args:
            step: Which; the newest if it is None.
            remap: Rules that make a state of this run of it.
            source: Where it is, if it is none of this run's.

        Raises:
            ConfigError: If an argument is something else than is asked for.
            RestoreError: If there is none that can be.
        """
        step = None if step is None else step_number(step)
        check_remap(remap, Remap)
        if source is not None:
            path = checked_path(source, "restore(source=path)")
            return self._choose_other(path, step, remap)
        try:
            self.wait()
        except SaveError as error:
            # What was saved before is whole, and is what is wanted now.
            self._events.emit("notice", message=str(error))
        self._checkpoints.reload()
        saved = self._checkpoints.steps()
        if not saved or step not in (None, *saved):
            raise RestoreError(
                f"{self._checkpoints.directory}: expected a checkpoint"
                + ("" if step is None else f" of step {step}")
                + f", found {saved or 'none'}"
            )
        self._is_certain, self._remap = step is not None, remap
        return self._take([step] if step is not None else saved[::-1], [])

    def _choose_other(self, source: Path, step: int | None, remap: Remap | None) -> int:
        """Chooses what was saved elsewhere, for a run that has saved nothing yet."""
        if there := self.steps():
            raise RestoreError(
                f"{self.directory}: holds steps {there} of a run, which cannot begin "
                f"from {source}. Give a new run another directory."
            )
        saved = open_checkpoint(source, step)
        if saved.manifest is None:
            raise RestoreError(
                f"{saved.directory}: was not saved by shardkit; bring it in by "
                "shardkit ckpt import"
            )
        self._is_certain, self._remap = True, remap
        self._chosen, self._own = saved, set()
        return saved.manifest.step

    def go_on(self, step: int) -> None:
        """Goes on from a step that was not read here, of this very run.

        Args:
            step: What was saved after it is made, and saved, again.
        """
        self._own = {saved for saved in self.steps() if saved <= step}
        self._checkpoints.go_back(step)

    def load(self, placement: Placement) -> tuple[int, Any]:
        """Reads the chosen step, or the newest before it that is whole.

        Returns:
            The step that it was, and the state.

        Raises:
            RestoreError: If nothing can be restored.
        """
        while True:
            assert self._chosen is not None
            manifest = self._chosen.manifest
            assert manifest is not None
            try:
                state = self._read(self._chosen, placement)
            except DamagedError as error:
                earlier = [s for s in self.steps() if s < manifest.step]
                # What can only not be read at the moment is nothing to go back from.
                is_whole = not check_sums(self._chosen.directory)
                if self._is_certain or not earlier or is_whole:
                    raise
                self._take(earlier[::-1], [(manifest.step, error)])
            else:
                self._events.emit("restored", step=manifest.step)
                self._tell_of_groups(manifest.mesh, placement.mesh.shape)
                return manifest.step, state

    def _tell_of_groups(self, saved: Mapping[str, Any], now: Mapping[str, int]) -> None:
        """Tells if groups of devices are of another size, which alters numbers."""
        if consistency_class(saved, now) == "exact":
            return
        sizes = [
            ", ".join(f"{axis} {mesh.get(axis, 1)}" for axis in GROUP_AXES)
            for mesh in (saved, now)
        ]
        self._events.emit(
            "notice",
            message=f"restored: saved with {sizes[0]}, now {sizes[1]}; the run goes on "
            "equal but for rounding, not with the same bits",
        )

    def _read(self, saved: Saved, placement: Placement) -> Any:
        if self._remap is None:
            return load(saved, placement)
        # Digests are of what was saved, not of what is made of it.
        with agreed(str(saved.directory)):
            saved.verified()
        views = self._remap.apply(saved.views, wanted_views(placement))
        made = Saved(saved.directory, saved.manifest, views)
        return load(made, placement, verify=False)

    def _take(self, steps: list[int], passed: list[tuple[int, DamagedError]]) -> int:
        """Chooses the first of some steps of which the manifest is whole.

        Args:
            steps: These.
            passed: What was passed over already, and why.
        """
        for step in steps:
            try:
                saved = self._checkpoints.open(step)
            except DamagedError as error:
                if step == steps[-1]:
                    raise
                passed = [*passed, (step, error)]
                continue
            self._check(saved)
            for other, error in passed:
                message = (
                    f"step {other} cannot be restored, going on from step {step}: "
                    f"{error}"
                )
                self._events.emit("notice", message=message)
            self._chosen, self._own = saved, {step}
            self._checkpoints.go_back(step)
            return step
        raise AssertionError("no step was given")

    def _check(self, saved: Saved) -> None:
        # What is made by rules is another run.
        changed = [] if self._remap else check_run(saved, self._run)
        if changed and self._exact:
            message = "bits may differ from the run that saved: " + ", ".join(changed)
            self._events.emit("notice", message=message)

    def wait(self) -> None:
        """Waits until what is being saved is committed."""
        with self._failing():
            self._checkpoints.wait()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Forgets what could not be saved, so that it can be saved again."""
        try:
            yield
        except BaseException:
            there = {*saved_steps(self._checkpoints.directory)}
            self._own &= there - self._checkpoints.abandoned
            raise

    def close(self) -> None:
        """Waits for what is being written."""
        self._checkpoints.close()


def open_history(
    config: CheckpointConfig | None,
    run: Mapping[str, Any],
    *,
    rows: int | BatchRamp,
    corpus_digest: str | None,
    events: EventLog,
    begins: bool = True,
) -> History | None:
    """Opens the checkpoints of a run; None for a run that keeps none.

    Args:
        config: Where they are.
        run: What a checkpoint must share: `seed` and `consistency` among it.
        rows: Examples in each global batch.
        corpus_digest: Of the data, if it has one.
        events: Where what happens is told.
        begins: Whether it is this process's run already; otherwise the directory is
            left alone until something is saved or restored.
    """
    if config is None:
        return None
    corpus = {} if corpus_digest is None else {"corpus_digest": corpus_digest}
    # Other generators are refused, see `keys`.
    random = {"seed": run["seed"], "generator": "threefry2x32", "partitionable": True}
    checkpoints = Checkpoints(config)
    if begins:
        checkpoints.begin()
    ramp = as_ramp(rows, "rows")
    return History(
        checkpoints,
        # Of another global batch, the examples of a step would be others.
        {**corpus, "rows": ramp.record, **run},
        random,
        ramp,
        corpus,
        events,
        exact=run["consistency"] == "exact",
    )
