"""Whether two runs should have the same bits, and why not.

Owns what enters the bits of a run: the keys of its config but those that only say how
it is watched and saved, its data, what it began from, versions, and the machine. What
two runs have really in common is `comparison.py`'s business.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from shardkit.config import differences, identity
from shardkit.report.jsonl import groups_met
from shardkit.report.stored_run import StoredRun

__all__ = ["Reason", "reasons_to_differ"]

_NOT_NUMERIC = (
    "checkpoint.",
    "train.certify",
    "train.eval_every",
    "train.eval_batches",
    "train.strict",
)
# Packages that compute, or build what is computed. What saves does not.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "shardkit")


@dataclasses.dataclass(frozen=True, slots=True)
class Reason:
    """Something that two runs do not share.

    Attributes:
        what: A key of the config, or what it is.
        a: What it is in one.
        b: What it is in the other.
    """

    what: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.what} {_spell(self.a)} / {_spell(self.b)}"


def reasons_to_differ(a: StoredRun, b: StoredRun) -> list[Reason]:
    """Lists all that lets two runs differ; empty if every bit should be the same.

    What is not known of one of them is taken to be as in the other.
    """
    found = [
        Reason(key, old, new)
        for key, (old, new) in differences(a.config, b.config).items()
        if not any(key.startswith(prefix) for prefix in _NOT_NUMERIC)
    ]
    found += _of_data(a, b)
    found += _of_environment(a, b)
    groups = [" then ".join(groups_met(run.steps)) for run in (a, b)]
    if len(groups_met([*a.steps, *b.steps])) > 1:
        found.append(Reason("groups of devices", *groups))
    rule = identity(a.config)["train.consistency"]
    if rule == "fast" and b.config.train.consistency == "fast":
        found.append(Reason("sums in any order: train.consistency", rule, rule))
    return found


def _of_data(a: StoredRun, b: StoredRun) -> Iterator[Reason]:
    digests = a.corpus_digest, b.corpus_digest
    if None not in digests and digests[0] != digests[1]:
        yield Reason("corpus digest", *digests)
    sources = [_source(run) for run in (a, b)]
    if None not in sources and sources[0] != sources[1]:
        yield Reason("begun from", *sources)


def _source(run: StoredRun) -> str | None:
    """What a run began from, in words; None if that is not known."""
    first = next(run.happened("begin"), None)
    return None if first is None else str(first.get("source") or "its seed")


def _of_environment(a: StoredRun, b: StoredRun) -> Iterator[Reason]:
    ours, theirs = (_environment(run) for run in (a, b))
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        values = ours.get(name), theirs.get(name)
        # Two values: it was gone on with elsewhere.
        moved = any(value is not None and " then " in value for value in values)
        if None not in values and (values[0] != values[1] or moved):
            yield Reason(name, *values)


def _environment(run: StoredRun) -> dict[str, str]:
    """What a run was computed with and on, by name; all of it if that changed."""
    found: dict[str, list[str]] = {}
    tables: list[Mapping[str, Any]] = [*run.environments]
    if not tables and isinstance(run.summary.get("versions"), dict):
        tables = [{"versions": run.summary["versions"]}]
    for table in tables:
        versions = table.get("versions")
        known = {k: v for k, v in table.items() if k != "versions"}
        if isinstance(versions, dict):
            known |= {name: versions.get(name) for name in _PACKAGES}
        for name, value in known.items():
            values = found.setdefault(name, [])
            if value is not None and str(value) not in values:
                values.append(str(value))
    return {name: " then ".join(values) for name, values in found.items() if values}


def _spell(value: Any) -> str:
    if value is None:
        return "none"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:16]}…"
