"""Plain values checked against type annotations.

Owns the rules by which a value from a TOML file, or a word from the command line,
becomes a `str`, `int`, `float`, `bool`, `Literal`, list or table: a whole number
serves as a number, `true` never serves as 1, and nothing else is converted. Which
keys exist is the business of `schema.py`.
"""

import json
import math
import tomllib
import types
from typing import Any, Literal, Union, get_args, get_origin

from shardkit.config.toml import toml_value
from shardkit.errors import ConfigError

__all__ = ["accepts", "convert", "convert_text", "describe"]

_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "none",
    Any: "text, a number, true or false, a list or a table",
}


def accepts(annotation: Any) -> bool:
    """Whether `convert` knows the annotation.

    >>> accepts(int | None), accepts(list[bytes])
    (True, False)
    """
    try:
        describe(annotation)
    except (KeyError, TypeError):  # TypeError: an annotation that cannot be hashed
        return False
    return True


def describe(annotation: Any) -> str:
    """Says in words what an annotation accepts.

    >>> describe(int | None)
    'a whole number or none'
    >>> describe(Literal["exact", "fast"])
    'one of "exact", "fast"'
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(member) for member in args)
    if origin is list:
        return f"a list, each item {describe(args[0])}"
    if origin is dict:
        return f"a table, each value {describe(args[1])}"
    return _NAMES[annotation]


def convert(value: Any, annotation: Any, where: str) -> Any:
    """Returns `value` as the annotation wants it.

    Args:
        value: What `tomllib` read.
        annotation: A type built from `str`, `int`, `float`, `bool`, `None`, `Any`,
            `Literal`, `list`, `dict` and unions of these.
        where: The place to name in an error, such as `"run.toml [mesh] data"`.

    Raises:
        ConfigError: If the value is of another type; says expected and found.

    >>> convert(3, float, "here")
    3.0
    >>> convert(True, int, "here")
    Traceback (most recent call last):
    shardkit.errors.ConfigError: here: expected a whole number, found true
    """
    try:
        return _convert(value, annotation)
    except TypeError:
        raise ConfigError(
            f"{where}: expected {describe(annotation)}, found {_found(value)}"
        ) from None


def convert_text(text: str, annotation: Any, where: str) -> Any:
    """Returns a word from the command line as the annotation wants it.

    The word is read as a TOML value and, where it is none, as bare text; a place
    for text takes it as it stands, and `none` empties a place that may be empty.

    Raises:
        ConfigError: As `convert` does.

    >>> convert_text("1e-3", float, "--optimizer.learning_rate")
    0.001
    >>> convert_text("none", float | None, "--train.ema") is None
    True
    >>> convert_text("fsdp", str | list[str], "--axis_rules.embed")
    'fsdp'
    """
    members = get_args(annotation) if _is_union(annotation) else (annotation,)
    if types.NoneType in members and text.lower() == "none":
        return None
    if all(m in (str, types.NoneType) or get_origin(m) is Literal for m in members):
        return convert(text, annotation, where)
    value = _read_value(text)
    if float in members and isinstance(value, str):
        # Numbers such as ".5" that TOML does not write but people do.
        try:
            value = float(text)
        except ValueError:
            pass
    return convert(value, annotation, where)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _convert(value: Any, annotation: Any) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if _is_union(annotation):
        for member in args:
            try:
                return _convert(value, member)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise TypeError
        return value
    if origin is dict and isinstance(value, dict):
        return {key: _convert(item, args[1]) for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [_convert(item, args[0]) for item in value]
    if annotation is Any:
        return _convert_any(value)
    if annotation is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise TypeError
        return float(value)
    if type(value) is not annotation:
        raise TypeError
    return value


def _convert_any(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _convert_any(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_convert_any(item) for item in value]
    if type(value) not in (str, int, float, bool):
        raise TypeError  # TOML's dates have no place in JSON, nor in a model
    return value


def _read_value(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A word with a line break could smuggle in a second key.
    return table["value"] if table.keys() == {"value"} else text


def _found(value: Any) -> str:
    try:
        return toml_value(value)
    except TypeError:
        return "none" if value is None else str(value)
