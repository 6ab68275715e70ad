"""The files of a run, read and checked.

Owns which fields they must have, and of which types. Its invariant: what it returns can
be computed with; it comes from files of others. Each error says which line is damaged.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardkit.report.jsonl import read_records

__all__ = ["read_events", "read_json", "read_metrics", "read_recoveries", "read_table"]

_NUMBER = (int, float)
_STEP = {"num_devices": int, "mesh": dict, "loss_bits": str}
_CHANGE = {
    **dict.fromkeys(("step", "from_devices", "to_devices", "bytes_moved"), int),
    **{"from_mesh": dict, "to_mesh": dict, "phases": list},
}
_PHASE = {"name": str, "start_s": _NUMBER, "end_s": _NUMBER}
_RECOVERY = {"cause": str, "step": int, "phases": list}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`; raises `ValueError` if it is damaged."""
    found = _read_lines(path)
    for number, record in enumerate(found, start=1):
        kind = record.get("event")
        if kind is None:
            _check(record, _STEP, f"line {number}")
            if not re.fullmatch(r"[0-9a-f]{8}", record["loss_bits"]):
                raise ValueError(f"line {number}: loss_bits are not 8 hex digits")
            _check_sizes(record["mesh"], f"line {number}: mesh")
            for name in ("loss", "step_s", "tokens_per_s"):
                if not isinstance(record.get(name), int | float | None):
                    raise ValueError(f"line {number}: {name} is no number")
            # Lines of older runs have none.
            others = record.get("metrics", {})
            if not isinstance(others, dict):
                raise ValueError(f"line {number}: metrics is no table")
            for name, x in others.items():
                if not isinstance(x, int | float | None):
                    raise ValueError(f"line {number}: {name} is no number")
        elif kind == "reconfigure":
            _check(record, _CHANGE, f"line {number}")
            for phase in record["phases"]:
                _check(phase, _PHASE, f"line {number}: a phase")
        elif kind == "first_step":
            _check(record, {k: _NUMBER for k in ("start_s", "end_s")}, f"line {number}")
        elif kind == "eval":
            _check(record, {"loss": _NUMBER}, f"line {number}")
    return found


def read_events(path: Path) -> list[dict[str, Any]]:
    """Reads `events.jsonl`, likewise."""
    found = _read_lines(path)
    for number, record in enumerate(found, start=1):
        _check(record, {"event": str}, f"line {number}")
        if record["event"] == "mesh":
            _check(record, {"mesh": dict, "device_ids": list}, f"line {number}")
            _check_sizes(record["mesh"], f"line {number}: mesh")
    return found


def read_recoveries(path: Path) -> list[dict[str, Any]]:
    """Reads `recoveries.json`, likewise."""
    found = read_json(path)
    if not isinstance(found, list):
        raise ValueError("expected a list of recoveries")
    for number, recovery in enumerate(found):
        _check(recovery, _RECOVERY, f"recovery {number}")
        for phase in recovery["phases"]:
            _check(phase, {"name": str, "s": _NUMBER}, f"recovery {number}: a phase")
    return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        found = read_records(path)
    except ValueError:
        lines = path.read_bytes().splitlines()
        number = next(n for n, line in enumerate(lines, start=1) if not _is_json(line))
        raise ValueError(f"line {number} is damaged: not JSON") from None
    for number, record in enumerate(found, start=1):
        _check(record, {"step": int}, f"line {number}")
    return found


def read_table(path: Path) -> dict[str, Any]:
    """Reads `summary.json`, likewise."""
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("steps", 0), int):
        raise ValueError("expected a table of a run that has ended")
    return found


def read_json(path: Path) -> Any:
    """Reads any JSON, likewise."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"damaged: not JSON: {error}") from None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _check(record: Any, kinds: Mapping[str, Any], where: str) -> None:
    """Refuses what is no table, or has a value of another type."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is damaged: expected a table")
    for name, kind in kinds.items():
        value = record.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{where} is damaged: {name} is {value!r:.40}")


def _check_sizes(mesh: Mapping[str, Any], where: str) -> None:
    if not all(type(size) is int and size > 0 for size in mesh.values()):
        raise ValueError(f"{where} is damaged: sizes are {mesh!r:.60}")
