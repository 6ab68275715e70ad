"""A run as its directory has it: finished, interrupted or under way.

Owns reading all of it at once, and the refusal of what is missing or damaged: one error
that names every file. Its invariant: a `StoredRun` that exists has whole records of the
types that they should have; they come from files of others. It changes nothing.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shardkit.cluster.kept_recoveries import RECOVERIES_NAME
from shardkit.config import RunConfig, load
from shardkit.errors import ConfigError, reason
from shardkit.report.layout_file import Leaf, parse_layout
from shardkit.report.stored_files import (
    read_events,
    read_json,
    read_metrics,
    read_recoveries,
    read_table,
)

__all__ = ["MeshStay", "StoredRun"]


@dataclasses.dataclass(frozen=True, slots=True)
class MeshStay:
    """Steps that followed one another on one mesh.

    Attributes:
        first: The first of them.
        last: The last.
        mesh: Axis → size, of the axes larger than 1.
        device_ids: In mesh order.
        is_recorded: Whether that order was recorded; else it is that of the ids.
    """

    first: int
    last: int
    mesh: dict[str, int]
    device_ids: tuple[int, ...]
    is_recorded: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoredRun:
    """What is known of a run.

    Attributes:
        path: Its directory.
        config: Its resolved config.
        records: The lines of `metrics.jsonl`, in order.
        events: The lines of `events.jsonl`; none of a run that did not write it.
        summary: What was written at its end; empty before that.
        leaves: Of the state; None where that was not recorded.
        recoveries: Of a run that a supervisor has started, what it took to go on.
        saved_steps: Of the checkpoints that are there.
    """

    path: Path
    config: RunConfig
    records: list[dict[str, Any]]
    events: list[dict[str, Any]]
    summary: dict[str, Any]
    leaves: list[Leaf] | None
    recoveries: list[dict[str, Any]]
    saved_steps: frozenset[int]

    @classmethod
    def read(cls, path: Path) -> "StoredRun":
        """Reads the directory of a run.

        Raises:
            ConfigError: If it is none, or files of it are damaged; names all of them.
        """
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            raise ConfigError(f"{path}: expected the directory of a run, found {found}")
        if not (path / "config.toml").is_file():
            raise ConfigError(
                f"{path}: expected the directory of a run, which has a config.toml; "
                f"found {_listing(path)}"
            )
        problems: list[str] = []

        def get(name: str, parse: Callable[[Path], Any], empty: Any) -> Any:
            file = path / name
            try:
                return parse(file) if file.exists() else empty
            except (OSError, ValueError, RecursionError) as error:
                # An error of the config has said already which file it is.
                text = reason(error)
                told = text if text.startswith(str(file)) else f"{file}: {text}"
                problems.append(told)
                return empty

        config = get("config.toml", load, None)
        records = get("metrics.jsonl", read_metrics, [])
        events = get("events.jsonl", read_events, [])
        summary = get("summary.json", read_table, {})
        leaves = get("layout.json", lambda file: parse_layout(read_json(file)), None)
        recoveries = get(RECOVERIES_NAME, read_recoveries, [])
        if problems:
            raise ConfigError("\n".join(problems))
        saved = (path / "checkpoints").glob("*")
        return cls(
            path=path,
            config=config,
            records=records,
            events=events,
            summary=summary,
            leaves=leaves,
            recoveries=recoveries,
            saved_steps=frozenset(int(p.name) for p in saved if p.name.isdecimal()),
        )

    @property
    def name(self) -> str:
        """What to call it."""
        return self.path.resolve().name

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The records of steps, in order."""
        return [record for record in self.records if "event" not in record]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Returns the records of one kind of event, in order."""
        return [record for record in self.records if record.get("event") == kind]

    @property
    def num_steps(self) -> int:
        """How many steps the run has made."""
        last = max((record["step"] + 1 for record in self.steps), default=0)
        return max(last, self.summary.get("steps") or 0)

    @property
    def is_finished(self) -> bool:
        """Whether a summary says that it got as far as its config asks."""
        return (self.summary.get("steps") or 0) >= self.config.train.steps

    def happened(self, *names: str) -> Iterator[dict[str, Any]]:
        """Yields the events of these names."""
        return (event for event in self.events if event["event"] in names)

    @property
    def environments(self) -> list[dict[str, Any]]:
        """What its processes ran on and with, each that differs once."""
        found: list[dict[str, Any]] = []
        for event in self.happened("environment"):
            facts = event.get("facts")
            if isinstance(facts, dict) and facts not in found:
                found.append(facts)
        return found

    @property
    def corpus_digest(self) -> str | None:
        """Of its data; None if it has none, or that is not known."""
        told = [
            e["corpus_digest"]
            for e in self.happened("environment")
            if "corpus_digest" in e
        ]
        found = [*told, self.summary.get("corpus_digest")]
        return next((str(digest) for digest in found if digest), None)

    def stays(self) -> list[MeshStay]:
        """Lists on which meshes the steps ran."""
        told = [
            (e["step"], e["mesh"], tuple(e["device_ids"]))
            for e in self.happened("mesh")
        ]
        found = []
        for mesh, steps in itertools.groupby(self.steps, lambda r: r["mesh"]):
            group = list(steps)
            first, last = group[0]["step"], group[-1]["step"]
            num = group[0]["num_devices"]
            # The newest that was told of them: steps may have been repeated.
            ids = [
                x for at, of, x in told if at <= last and of == mesh and len(x) == num
            ]
            order = ids[-1] if ids else tuple(range(num))
            found.append(MeshStay(first, last, mesh, order, bool(ids)))
        return found


def _listing(path: Path) -> str:
    names = sorted(each.name for each in path.iterdir())[:6]
    return ", ".join(names) or "nothing in it"
