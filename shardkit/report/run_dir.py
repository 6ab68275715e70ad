"""The directory of a run: whether it may be used, and what lies where in it.

Owns the rules of `--out` and `--resume`. Its invariant: nothing that a run has saved
is ever overwritten by another run. It knows where checkpoints lie and reads none.
"""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardkit.config import RunConfig, differences, load, to_toml
from shardkit.errors import ConfigError
from shardkit.report.jsonl import write_atomically

__all__ = ["RunDirectory", "claim"]


class RunDirectory:
    """Where one run writes.

    Attributes:
        path: The directory.
        config: The config of the run.
        resumes: Whether the directory holds the beginning of this run.
    """

    def __init__(self, path: Path, config: RunConfig, *, resumes: bool):
        self.path = path
        self.config = config
        self.resumes = resumes

    @classmethod
    def open(
        cls, out: Path | None, config: RunConfig, *, stem: str, resume: bool
    ) -> "RunDirectory":
        """Checks that the directory may be used; a default one is made at once.

        As a context manager, a directory in which nothing was written goes again.

        Args:
            out: The directory, or None for the first `runs/<stem>-<number>` that
                does not exist.
            config: The config of the run.
            stem: Name of the config.
            resume: Whether to go on with what is there.

        Raises:
            ConfigError: If it is not empty and `resume` is false, is no directory of
                a run, or of a run with another config; lists every key that differs.
        """
        if out is None:
            return cls(claim(stem), config, resumes=False)
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out {out}: expected a directory, found a file")
        _check_makeable(out)
        if not out.exists() or not any(out.iterdir()):
            return cls(out, config, resumes=False)
        if not resume:
            raise ConfigError(
                f"--out {out}: the directory is not empty; "
                "add --resume to go on with its run, or choose another"
            )
        _check_same_run(out, config)
        return cls(out, config, resumes=True)

    @property
    def config_file(self) -> Path:
        """The resolved config, with which `train.py` goes on with the run."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """The file of steps and events."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """The file of what happened beside the steps."""
        return self.path / "events.jsonl"

    @property
    def layout(self) -> Path:
        """The file of the leaves of the state."""
        return self.path / "layout.json"

    @property
    def report(self) -> Path:
        """The page that shows all of it."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """The directory of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def picture(self) -> Path:
        """The picture of the loss."""
        return self.path / "loss.png"

    @property
    def timeline(self) -> Path:
        """The picture of the changes of devices, phase by phase."""
        return self.path / "changes.png"

    @property
    def trace(self) -> Path:
        """What happened when, for a trace viewer."""
        return self.path / "trace.json"

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint was ever begun here."""
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    @property
    def is_finished(self) -> bool:
        """Whether a summary says that the run got as far as its config asks."""
        return self.summary().get("steps", -1) >= self.config.train.steps

    @property
    def has_twin(self) -> bool:
        """Whether a twin has been run to its end here."""
        return (self.path / "twin" / "summary.json").exists()

    def open_twin(self) -> "RunDirectory":
        """Returns the directory of the same run without changes of devices.

        Raises:
            ConfigError: As `open` does.
        """
        config = dataclasses.replace(self.config, resize="")
        return RunDirectory.open(self.path / "twin", config, stem="twin", resume=True)

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        for path in (self.checkpoints, self.path):
            # Fails, as it should, on a directory that is not empty or not there.
            with contextlib.suppress(OSError):
                path.rmdir()

    def prepare(self) -> None:
        """Makes the directory and writes the resolved config."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_file, to_toml(self.config))

    def summary(self) -> dict[str, Any]:
        """Reads the summary; empty if there is none."""
        path = self.path / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replaces the summary in one atomic move."""
        text = json.dumps(summary, indent=2) + "\n"
        write_atomically(self.path / "summary.json", text)


def claim(stem: str) -> Path:
    """Makes the first `runs/<stem>-<number>` that nobody else has made."""
    for number in itertools.count(1):
        path = Path("runs") / f"{stem}-{number:03d}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("numbers do not end")


def _check_same_run(out: Path, config: RunConfig) -> None:
    saved_path = out / "config.toml"
    if not saved_path.exists():
        raise ConfigError(
            f"--out {out}: neither empty nor the directory of a run, which would have "
            "a config.toml; choose another"
        )
    changed = differences(load(saved_path), config)
    if changed:
        rows = "\n".join(
            f"  {key}: {old!r} there, {new!r} asked for"
            for key, (old, new) in changed.items()
        )
        raise ConfigError(
            f"--resume: {out} holds the run of another config:\n{rows}\n"
            f"Ask for what is there, which is {saved_path}, or choose another --out "
            "for a new run."
        )


def _check_makeable(out: Path) -> None:
    """Refuses a directory that cannot be made or written, before anything runs."""
    above = next(
        (path for path in (out, *out.absolute().parents) if path.exists()), out
    )
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"--out {out}: {above} is no directory in which this user can make files; "
            "name another"
        )
