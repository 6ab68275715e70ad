"""Remap rules as TOML.

Owns reading and writing them. Invariant: reading what was written gives equal rules,
and what cannot be read is refused with one error that lists all that is wrong. It
knows nothing of trees.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from shardkit.checkpoint.mapping import counted, format_rows
from shardkit.checkpoint.remap_ops import OPS, Op, Reshape, Transpose
from shardkit.checkpoint.rules import Rule
from shardkit.errors import ConfigError

__all__ = ["parse_remap", "spell_remap"]

_OPTIONS = {
    "keep_rest": bool,
    "follow": tuple[str, ...],
    "root": str,
    "allow": tuple[str, ...],
}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple[int, ...]: "a list of whole numbers",
    tuple[float, ...]: "a list of numbers",
    tuple[str, ...]: "a list of texts",
}
# These take the field that is named by its place, as many as there are.
_VARIADIC = {Transpose: "dims", Reshape: "shape"}


def parse_remap(text: str, where: str) -> tuple[list[Rule], dict[str, Any]]:
    """Reads rules and the other arguments of a `Remap`.

    Args:
        text: The TOML.
        where: What to call it in errors.

    Raises:
        ConfigError: If anything in it is wrong.
    """
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not TOML: {error}") from None
    tables = table.pop("rule", [])
    problems: list[tuple[str, str]] = []
    rules, options = [], {}
    try:
        options = _take(table, _OPTIONS, "[[rule]]")
    except ConfigError as error:
        problems.append(("top", str(error)))
    if not isinstance(tables, list):
        problems.append(("rule", "expected [[rule]], in two brackets"))
        tables = []
    for number, entry in enumerate(tables, 1):
        try:
            rules.append(_parse_rule(entry))
        except ConfigError as error:
            problems.append((f"rule {number}", str(error)))
    if problems:
        raise ConfigError(
            f"{where}: {counted(len(problems), 'entry', 'is', 'are')} wrong:\n"
            + format_rows(problems)
        )
    return rules, options


def spell_remap(rules: Sequence[Rule], options: Mapping[str, Any]) -> str:
    """Writes rules and the other arguments of a `Remap`.

    >>> from shardkit.checkpoint.remap_ops import Stack
    >>> print(spell_remap([Rule("h/{i}/w", "h/w", Stack("i"))], {"root": ""}), end="")
    root = ""
    <BLANKLINE>
    [[rule]]
    from = "h/{i}/w"
    to = "h/w"
    ops = [{op = "stack", over = "i"}]
    """
    blocks = ["\n".join(f"{k} = {_spell(v)}" for k, v in options.items())]
    for rule in rules:
        lines = ["[[rule]]"]
        for key, texts in (("from", rule.sources), ("to", rule.targets)):
            if texts:
                lines.append(
                    f"{key} = {_spell(texts[0] if len(texts) == 1 else texts)}"
                )
        ops = [{"op": op.word, **op.options()} for op in rule.ops]
        blocks.append("\n".join([*lines, f"ops = {_spell(ops)}"]))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _parse_rule(entry: Any) -> Rule:
    if not isinstance(entry, dict):
        raise ConfigError(f"expected [[rule]] with from, to and ops, found {entry!r}")
    entry = dict(entry)
    for key in ("from", "to"):
        if isinstance(entry.get(key), str):
            entry[key] = [entry[key]]
    ops = entry.pop("ops", [])
    sides = _take(entry, {"from": tuple[str, ...], "to": tuple[str, ...]}, "ops")
    if not sides:
        raise ConfigError('expected from = "..." and to = "...", found neither')
    if not isinstance(ops, list):
        raise ConfigError(f"ops: expected a list such as [{{op = ...}}], found {ops!r}")
    return Rule(sides.get("from", ()), sides.get("to", ()), *map(_parse_op, ops))


def _parse_op(entry: Any) -> Op:
    if not isinstance(entry, dict) or not isinstance(entry.get("op"), str):
        raise ConfigError(f'ops: expected {{op = "...", ...}}, found {entry!r}')
    word = entry["op"]
    if word not in OPS:
        raise ConfigError(
            f"op: expected one of {', '.join(OPS)}, found {word!r}{_hint(word, OPS)}"
        )
    op = OPS[word]
    fields = {field.name: field.type for field in dataclasses.fields(op)}
    rest = {key: value for key, value in entry.items() if key != "op"}
    try:
        options = _take(rest, fields)
    except ConfigError as error:
        raise ConfigError(f"op {word}: {error}") from None
    needed = {
        field.name
        for field in dataclasses.fields(op)
        if field.default is dataclasses.MISSING
    }
    if needed - options.keys():
        raise ConfigError(
            f"op {word}: {', '.join(sorted(needed - options.keys()))} is missing"
        )
    many = options.pop(_VARIADIC[op]) if op in _VARIADIC else ()
    return op(*many, **options)


def _take(
    table: Mapping[str, Any], kinds: Mapping[str, Any], *others: str
) -> dict[str, Any]:
    """Checks that a table has only what it may have, each of its type."""
    found = {}
    for key, value in table.items():
        if key not in kinds:
            names = [*kinds, *others]
            raise ConfigError(
                f"{key}: there is no such key, expected {', '.join(names) or 'none'}"
                f"{_hint(key, names)}"
            )
        kind = _without_none(kinds[key])
        if not _is(value, kind):
            raise ConfigError(f"{key}: expected {_WORDS[kind]}, found {value!r}")
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        (kind,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
    return kind


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        (inner, _) = typing.get_args(kind)
        return isinstance(value, list) and all(_is(each, inner) for each in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f". Did you mean {close[0]}?" if close else ""


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        items = (f"{key} = {_spell(each)}" for key, each in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_spell, value))}]"
    return repr(value)
