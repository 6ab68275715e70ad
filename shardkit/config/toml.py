"""TOML in and out.

Owns reading a file with errors that name it, and writing, which the standard
library lacks. Its invariant is the round trip: `tomllib.loads(dump_toml(t)) == t`
for every table of text, numbers, booleans, lists and tables.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardkit.errors import ConfigError

__all__ = ["dump_toml", "read_toml", "toml_value"]


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        ConfigError: If it is missing, a directory, unreadable or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file{_others(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: expected a TOML file, found a directory") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"{path}: expected TOML in UTF-8, found other bytes"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def dump_toml(table: Mapping[str, Any]) -> str:
    """Writes a table as TOML; entries that are None are left out.

    >>> print(dump_toml({"devices": None, "mesh": {"data": -1}}), end="")
    [mesh]
    data = -1
    """
    return "\n\n".join(_sections(table, ())) + "\n"


def toml_value(value: Any) -> str:
    """Writes one value, on one line.

    Raises:
        TypeError: If TOML has no such value.

    >>> toml_value({"a": [1, "b"]})
    '{a = [1, "b"]}'
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, Mapping):
        items = ", ".join(f"{_key(k)} = {toml_value(v)}" for k, v in value.items())
        return "{" + items + "}"
    raise TypeError(f"TOML has no {type(value).__name__}")


def _others(path: Path) -> str:
    names = sorted(p.name for p in path.parent.glob("*.toml"))
    return f"; {path.parent} has {', '.join(names)}" if names else ""


def _sections(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [f"[{'.'.join(map(_key, path))}]"] if path else []
    for key, value in table.items():
        if value is not None and not isinstance(value, Mapping):
            lines.append(f"{_key(key)} = {toml_value(value)}")
    sections = ["\n".join(lines)] if lines else []
    for key, value in table.items():
        if isinstance(value, Mapping):
            sections += _sections(value, (*path, key))
    return sections


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped as well.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
