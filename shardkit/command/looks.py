"""What a path looks like, where it is not what was said of it.

Owns the guess from names of files and of arrays. It decides nothing but a message.
"""

from pathlib import Path

from shardkit.checkpoint.whereabouts import describe_absent
from shardkit.command.sources import INDEX_NAMES, is_safetensors, open_source
from shardkit.errors import ConfigError, RestoreError, ShardkitError

__all__ = ["check_format"]

_OURS = "a checkpoint of shardkit"
_NAMES = {
    "huggingface": "a model of Hugging Face",
    "safetensors": "safetensors",
    "orbax": "a tree of Orbax",
    "maxtext": "a checkpoint of MaxText",
}


def check_format(path: Path, step: int | None, said: str) -> None:
    """Refuses what is plainly of another format than was said.

    Raises:
        ConfigError: Saying what it looks like.
        RestoreError: If there is nothing.
    """
    if not path.exists():
        raise RestoreError(f"{path}: {describe_absent(path.absolute())}")
    found, formats = _look(path, step)
    if not found or said in formats:
        return
    advice = f"say --from {' or '.join(formats)}"
    if found == _OURS:
        advice = "it needs no import; ckpt remap makes another tree of it"
    raise ConfigError(
        f"--from {said}: {path} looks like {found}, not {_NAMES[said]}; {advice}"
    )


def _look(path: Path, step: int | None) -> tuple[str, tuple[str, ...]]:
    """Finds out what it is, and as what it can be read; nothing if that is unknown."""
    if is_safetensors(path):
        has_config = path.is_dir() and (path / "config.json").is_file()
        if has_config and any((path / name).is_file() for name in INDEX_NAMES):
            return _NAMES["huggingface"], ("huggingface", "safetensors")
        return _NAMES["safetensors"], ("safetensors",)
    try:
        saved = open_source(path, step)
    except ShardkitError:
        return "", ()
    if any("/decoder/layers" in name for name in saved.views):
        return _NAMES["maxtext"], ("maxtext", "orbax")
    return (_NAMES["orbax"] if saved.manifest is None else _OURS), ("orbax",)
