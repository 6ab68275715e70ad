"""The command line of `train.py`: flags, environment and exit codes.

Owns what happens before JAX starts and after the run has ended. Its invariant:
reading a command line, and finding fault with it, never imports JAX. It builds
nothing; `build.py` does.
"""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from shardkit import config as configs
from shardkit.checkpoint.remap import Remap, load_rules
from shardkit.config import Override, RunConfig
from shardkit.errors import ConfigError
from shardkit.sampling import Sampling

__all__ = [
    "Arguments",
    "exit_code",
    "parse_arguments",
    "plan_resizes",
    "prepare_environment",
    "resume_command",
]

NUM_THREADS = 8
"""Threads of XLA's CPU client, whatever the machine has: how a matrix product is cut,
and so its bits, follows their number."""

EXIT_CODES = {"CertificateError": 3, "NonFiniteError": 3, "Preempted": 75}
"""What is not bad input, by the name of the exception."""

_EPILOG = """\
config keys:
  `key` of `[section]` in CONFIG.toml is changed by --section.key VALUE:
    --optimizer.learning_rate 1e-3  --model.options.num_layers 2  --mesh.fsdp=4
  What a flag stands for is in brackets above; DIR/config.toml has every key.

signals:
  SIGUSR1  go on with one device fewer    SIGUSR2  with one more, up to the pool
  SIGTERM  save and leave, to be resumed

exit codes:
  0   finished
  2   bad input: a message says what and where
  3   a failed certificate, a loss that is not finite, or a twin that differs
  75  left after SIGTERM; the last line is the command to go on with
  130 interrupted by Ctrl-C; the same, from the newest checkpoint
"""

_SAMPLE_FLAGS = {
    "num_bytes": ("--sample-bytes", int, "N", "how much it adds; 200 if not given"),
    "temperature": ("--sample-temperature", float, "T", "0 takes the likeliest; 0.8"),
    "top_k": ("--sample-top-k", int, "K", "draw of the likeliest only; all"),
    "seed": ("--sample-seed", int, "N", "another one draws another text; 0"),
}

_FLAGS = {
    "devices": ("devices", "N", "size of the pool; 8 emulated, or every real one"),
    "resize": ("resize", "STEP:N,...", "devices from the beginning of a step on"),
    "steps": ("train.steps", "N", "the step at which the run ends, also on resume"),
    "seed": ("train.seed", "N", "root of all randomness and of the data's order"),
    "consistency": ("train.consistency", "exact|fast", "keep the bits, or not"),
    "certify": ("train.certify", "always|first|off", "which resizes are checked"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """The command line of `train.py`, read and checked."""

    path: Path
    """The config file."""
    config: RunConfig
    """The file with all that the command line changes."""
    out: Path | None
    """The run's directory; None for a fresh one."""
    resume: bool
    """Go on from the newest checkpoint of `out`."""
    twin: bool
    """Also run without any resize, and compare."""
    source: Path | None
    """What a new run begins from, if not from step 0."""
    remap: Remap | None
    """The rules that make a state of this run of it."""
    inspect: bool
    """Only say what the programs cost."""
    sampling: Sampling | None = None
    """What to go on with when the run is at its end."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; see --help")


def parse_arguments(argv: list[str]) -> Arguments:
    """Reads the command line and the config that it names.

    Raises:
        ConfigError: If either is unusable.
        SystemExit: With code 0, after `--help`.
    """
    plain, overrides = _split_overrides(argv)
    parser = _Parser(
        prog="train.py",
        allow_abbrev=False,
        usage="%(prog)s CONFIG.toml [options] [--section.key VALUE ...]",
        description="Trains a model on any number of devices, and on changing ones.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config",
        metavar="CONFIG.toml",
        type=Path,
        help="model, data, optimizer and all the rest of a run; see configs/",
    )
    for flag, (key, metavar, text) in _FLAGS.items():
        parser.add_argument(f"--{flag}", metavar=metavar, help=f"{text} [{key}]")
    parser.add_argument(
        "--mesh",
        choices=["auto"],
        help="has the mesh chosen, whatever the config says of it [mesh.auto]",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="the run's directory; the first free runs/CONFIG-NNN if not given",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out DIR",
    )
    parser.add_argument(
        "--from",
        metavar="PATH",
        type=Path,
        dest="source",
        help="begin from the newest checkpoint of another run, or this one step",
    )
    parser.add_argument(
        "--remap",
        metavar="RULES.toml",
        type=Path,
        help="what becomes of its leaves in this run's state; see docs/checkpoints.md",
    )
    parser.add_argument(
        "--twin",
        action="store_true",
        help="then run again on the whole pool throughout, and compare every bit",
    )
    parser.add_argument(
        "--inspect",
        action="store_true",
        help="compile for the pool, say what a step costs on a device, and leave",
    )
    parser.add_argument(
        "--sample",
        metavar="TEXT",
        help="at the end, also of a finished run, let the model go on with this text",
    )
    for name, (flag, kind, metavar, text) in _SAMPLE_FLAGS.items():
        parser.add_argument(
            flag, dest=f"sample_{name}", type=kind, metavar=metavar, help=text
        )
    found = parser.parse_args(plain)
    if found.resume and found.out is None:
        raise ConfigError("--resume: which run? name its directory with --out DIR")
    if found.resume and found.source is not None:
        raise ConfigError(
            "--from: is for a new run, and --resume goes on with one; leave one out"
        )
    if found.remap is not None and found.source is None:
        raise ConfigError("--remap: of which checkpoint? name it with --from PATH")
    flags = [
        Override(key, getattr(found, flag), f"--{flag}")
        for flag, (key, _, _) in _FLAGS.items()
        if getattr(found, flag) is not None
    ]
    if found.mesh == "auto":
        chosen = {"auto": "true", "data": "1", "fsdp": "-1"}
        flags += [Override(f"mesh.{k}", x, "--mesh") for k, x in chosen.items()]
    return Arguments(
        path=found.config,
        config=configs.load(found.config, [*overrides, *flags]),
        out=found.out,
        resume=found.resume,
        twin=found.twin,
        source=found.source,
        remap=found.remap and load_rules(found.remap),
        inspect=found.inspect,
        sampling=_sampling(found),
    )


def _sampling(found: argparse.Namespace) -> Sampling | None:
    given = {name: getattr(found, f"sample_{name}") for name in _SAMPLE_FLAGS}
    given = {name: value for name, value in given.items() if value is not None}
    if found.sample is not None:
        return Sampling(prompt=found.sample, **given)
    if given:
        flag = _SAMPLE_FLAGS[next(iter(given))][0]
        raise ConfigError(f"{flag}: of which text? give --sample TEXT")
    return None


def prepare_environment(
    num_devices: int | None,
    run_cache: Path,
    *,
    num_local: int | None = None,
    join: Callable[[], None] = lambda: None,
) -> None:
    """Sets what JAX reads when it starts, and configures logging.

    Call it before anything touches a device. Variables that the user has set stay.

    Args:
        num_devices: Size of the pool; None is 8. Where there is no accelerator, at
            least 8 CPU devices are emulated, of which a smaller pool is the first.
        run_cache: Where a run on an accelerator keeps its compiled programs, for
            another process that goes on with it.
        num_local: How many of the devices are this process's, if there are others.
        join: What makes this process one of several; before devices are used.

    Raises:
        ConfigError: If this process has started JAX's devices already, or others may
            write where programs are kept.
    """
    num_devices = num_devices or 8
    # Every emulated device needs a thread for collectives to meet.
    os.environ.setdefault("PJRT_NPROC", str(max(NUM_THREADS, num_devices)))
    logging.basicConfig(
        level=os.environ.get("SHARDKIT_LOG_LEVEL", "WARNING").upper(),
        format="%(levelname)s %(name)s: %(message)s",
    )
    logging.captureWarnings(True)
    import jax

    from shardkit.program_cache import use_program_cache

    try:
        # Programs are kept for one number of visible devices, so that a run that goes
        # on with a smaller pool finds them only if it sees as many.
        num_emulated = num_local or max(NUM_THREADS, num_devices)
        jax.config.update("jax_num_cpu_devices", num_emulated)
    except RuntimeError as error:
        raise ConfigError(f"prepare_environment: came too late: {error}") from error
    join()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        shared = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        on_cpu = jax.default_backend() == "cpu"
        cache = shared / "shardkit" / "jax" if on_cpu else run_cache
        use_program_cache(cache)
        return
    # A change of devices waits for compilation, so even the cheapest is kept.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def plan_resizes(config: RunConfig, pool: int) -> tuple[dict[int, int], dict[int, int]]:
    """Splits the schedule into the entries that will come and those beyond the end.

    Raises:
        ConfigError: As `parse_resize` does.
    """
    schedule = configs.parse_resize(config.resize, pool)
    coming = {s: n for s, n in schedule.items() if s < config.train.steps}
    return coming, {s: n for s, n in schedule.items() if s not in coming}


def exit_code(error: BaseException) -> int:
    """Returns what `train.py` exits with: 3 for wrong numbers, 75 to be resumed, or 2.

    >>> exit_code(ConfigError("unknown key"))
    2
    """
    names = [cls.__name__ for cls in type(error).__mro__]
    return next((EXIT_CODES[name] for name in names if name in EXIT_CODES), 2)


def resume_command(config: Path, out: Path, *, twin: bool) -> str:
    """Returns the command that goes on with a run, to be typed in the same directory.

    Args:
        config: The run's resolved config.
        out: The run's directory.
        twin: Whether a twin is still to be run or compared.
    """
    words = [sys.orig_argv[0], sys.argv[0], str(config), "--resume", "--out", str(out)]
    return shlex.join([*words, "--twin"] if twin else words)


def _split_overrides(argv: list[str]) -> tuple[list[str], list[Override]]:
    """Takes `--table.key VALUE` out, which argparse would take for positionals."""
    plain, overrides, words = [], [], iter(argv)
    for word in words:
        name, equals, text = word.partition("=")
        if not (name.startswith("--") and "." in name):
            plain.append(word)
            continue
        if not equals:
            text = next(words, None)
            if text is None:
                raise ConfigError(f"{name}: expected a value, found the end of line")
        overrides.append(Override(name[2:], text, name))
    return plain, overrides
