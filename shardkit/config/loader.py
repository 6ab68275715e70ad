"""From a TOML file and words of the command line to a `RunConfig`.

Owns strictness: a key that nobody reads is an error with a suggestion, and every
problem of a config is reported at once, each with its file and table or its flag.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from shardkit.config.schema import RunConfig
from shardkit.config.toml import read_toml
from shardkit.config.values import convert, convert_text
from shardkit.errors import ConfigError

__all__ = ["Override", "from_dict", "load", "suggest"]


@dataclass(frozen=True, slots=True)
class Override:
    """One word of the command line that replaces a value of the file."""

    key: str
    """The dotted key, `optimizer.learning_rate`."""
    text: str
    """The value as it was typed."""
    flag: str
    """What the user typed, to name in an error."""


def load(path: str | Path, overrides: Sequence[Override] = ()) -> RunConfig:
    """Reads a config file and applies what the command line changes.

    Args:
        path: A TOML file.
        overrides: Values that replace those of the file, later ones winning.

    Raises:
        ConfigError: If the file cannot be read or is not TOML, or any key is
            unknown, missing, of a wrong type or out of range; lists every one.
    """
    table = read_toml(Path(path))
    problems = []
    for override in overrides:
        try:
            _apply(table, override)
        except ConfigError as error:
            problems.append(str(error))
    flags = {override.key: override.flag for override in overrides}
    return _build_run(table, _Source(str(path), flags, problems))


def from_dict(table: Mapping[str, Any], where: str = "config") -> RunConfig:
    """Builds a config from nested plain values; the inverse of `to_dict`.

    Raises:
        ConfigError: As `load` does.
    """
    return _build_run(table, _Source(where, {}, []))


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns what to say about an unknown word: the nearest known one, or all.

    >>> suggest("learning_rat", ["learning_rate", "schedule"])
    "did you mean 'learning_rate'?"
    >>> suggest("x", ["data", "fsdp"])
    'known: data, fsdp'
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


@dataclass(frozen=True, slots=True)
class _Source:
    """Where values came from, and what has been found wrong with them so far."""

    file: str
    flags: dict[str, str]
    problems: list[str]

    def place(self, prefix: str) -> str:
        """Names a table, and the flags that changed something in it."""
        flags = [
            flag for key, flag in self.flags.items() if key.rpartition(".")[0] == prefix
        ]
        table = f"{self.file} [{prefix}]" if prefix else self.file
        return " with ".join([table, *flags])

    def key(self, prefix: str, name: str) -> str:
        """Names one key."""
        dotted = f"{prefix}.{name}" if prefix else name
        if dotted in self.flags:
            return self.flags[dotted]
        return f"{self.file} [{prefix}] {name}" if prefix else f"{self.file} {name}"


def _build_run(table: Mapping[str, Any], source: _Source) -> RunConfig:
    config = _build(RunConfig, table, "", source)
    if source.problems:
        raise ConfigError("\n".join(source.problems))
    return config


def _build(cls: Any, table: Mapping[str, Any], prefix: str, source: _Source) -> Any:
    """Builds a section; on trouble, adds to the problems and returns None."""
    hints = get_type_hints(cls)
    before = len(source.problems)
    for name in table.keys() - hints.keys():
        near = _near(name, hints, f"[{prefix}.options] {name}")
        source.problems.append(f"{source.key(prefix, name)}: unknown key; {near}")
    values = {}
    for item in fields(cls):
        where = source.key(prefix, item.name)
        if item.name in table:
            values[item.name] = _value(
                hints[item.name], table[item.name], prefix, item.name, source
            )
        elif item.default is MISSING and item.default_factory is MISSING:
            kind = "table" if is_dataclass(hints[item.name]) else "key"
            source.problems.append(f"{where}: this {kind} is missing")
    if len(source.problems) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:
        source.problems.append(f"{source.place(prefix)}: {error}")
        return None


def _value(hint: Any, value: Any, prefix: str, name: str, source: _Source) -> Any:
    where = source.key(prefix, name)
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            return _build(hint, value, name, source)
        source.problems.append(f"{where}: expected a table, found {value!r}")
        return None
    try:
        return convert(value, hint, where)
    except ConfigError as error:
        source.problems.append(str(error))
        return None


def _apply(table: dict[str, Any], override: Override) -> None:
    """Sets one dotted key in place."""
    hint: Any = RunConfig
    for name in override.key.split("."):
        hint = _descend(hint, name, override)
    if is_dataclass(hint):
        raise ConfigError(
            f"{override.flag}: {override.key} is a table; "
            f"name one of its keys, as in --{override.key}.{fields(hint)[0].name}"
        )
    *path, last = override.key.split(".")
    for name in path:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{override.flag}: {name!r} is a value, not a table")
    table[last] = convert_text(override.text, hint, override.flag)


def _descend(hint: Any, name: str, override: Override) -> Any:
    """Returns the annotation of what a name means inside of another."""
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        if name in hints:
            return hints[name]
        table, _, rest = override.key.partition(".")
        near = _near(name, hints, f"--{table}.options.{rest}")
        raise ConfigError(f"{override.flag}: unknown key {name!r}; {near}")
    if hint is Any:
        return Any  # inside of options, whose keys the factory knows
    if get_origin(hint) is dict:
        return get_args(hint)[1]
    raise ConfigError(f"{override.flag}: {name!r} is inside a value, not a table")


def _near(name: str, hints: Mapping[str, Any], option: str) -> str:
    """Says what was meant by an unknown key, which may be one of a factory."""
    near = suggest(name, hints)
    if "options" not in hints or near.startswith("did"):
        return near
    return f"{near}; if the factory takes it, write {option}"
