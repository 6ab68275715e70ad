"""`shardkit calibrate`: measures what this machine reaches, for `shardkit plan`.

Owns the command line of it and the table of what was found. What is measured, and how,
is the planner's.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from shardkit.command.options import MOST_EMULATED, can_write, number
from shardkit.command.output import Output
from shardkit.errors import ConfigError
from shardkit.planner.profile import profile_names, profile_table

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "measure what the devices that are there reach, for plan --profile"
EPILOG = """\
It takes about a minute, in which nothing else should run on these devices. Without an
accelerator, devices are emulated. docs/planning.md says what is measured.

  shardkit calibrate --out mine.toml
  shardkit plan configs/llama_1b.toml --devices 8 --profile mine.toml

exit codes:
  0    measured
  2    bad input: a message says what
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    parser.add_argument(
        "--out",
        metavar="FILE.toml",
        type=Path,
        help="where the profile is written [nowhere: it is shown]",
    )
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help=f"whose datasheet holds: {', '.join(profile_names())}, or a file of yours "
        "(.toml) [that of the device]",
    )
    parser.add_argument(
        "--devices",
        metavar="N",
        type=number(1),
        help="how many to use, or to emulate [all; 8 emulated]",
    )
    parser.add_argument(
        "--limit-s",
        metavar="S",
        type=number(1),
        default=60,
        help="about how many seconds it may take [60]",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Calibrates, shows what was found and writes it."""
    out: Path | None = arguments.out
    if out is not None and not (out.suffix == ".toml" and can_write(out)):
        raise ConfigError(
            f"--out: expected a .toml file in a directory that is there, found {out}"
        )
    # What is wrong with it is said before devices are started.
    given = profile_table(arguments.profile) if arguments.profile else None
    devices = _devices(arguments.devices)
    # What follows needs JAX.
    from shardkit.config.toml import dump_toml
    from shardkit.planner.calibrator import calibrate, guess_base

    base_name = arguments.profile or guess_base(devices[0])
    base, where = given or profile_table(base_name)
    output.note(f"measuring {len(devices)} × {devices[0].device_kind}, beside {where}")
    found = calibrate(base, str(base_name), devices, limit_s=arguments.limit_s)
    text = dump_toml(found.table)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if output.as_json:
        samples = [
            {"name": x.name, "seconds": x.seconds, "amounts": dict(x.amounts)}
            for x in found.samples
        ]
        output.document(
            {
                "profile": found.table,
                "samples": samples,
                "kept": found.kept,
                "out": None if out is None else str(out),
            }
        )
    else:
        _show(found, base, str(base_name), output)
        output.line(f"written to {out}" if out else f"\n{text}")
    return 0


def _devices(num: int | None) -> list[Any]:
    """The devices to measure; those of the CPU are emulated where nothing else is."""
    if num is not None and num > MOST_EMULATED:
        raise ConfigError(f"--devices: expected at most {MOST_EMULATED}, found {num}")
    # Every emulated device needs a thread for collectives to meet.
    os.environ.setdefault("PJRT_NPROC", str(max(8, num or 8)))
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", num or 8)
    except RuntimeError:
        # They have been started already; then there are as many as there are.
        pass
    if jax.process_count() > 1:
        raise ConfigError("calibrate: expected one process, as it measures one host")
    there = jax.devices()
    if num is not None and num > len(there):
        raise ConfigError(f"--devices: expected at most {len(there)}, found {num}")
    return there[:num]


def _show(found: Any, base: Any, base_name: str, output: Output) -> None:
    from shardkit.planner.calibration import fit, predicted_s

    fitted = fit(found.samples)
    rows = [
        (x.name, _seconds(x.seconds), _ratio(predicted_s(x, fitted), x.seconds))
        for x in found.samples
    ]
    output.table(["program", "measured", "fitted / measured"], rows, right=[1, 2])
    output.line()
    rows = [
        (name, f"{_at(found.table, name):.3g}", f"{_at(base, name):.3g}")
        for name in _names(found.table["measured"])
        if name not in found.kept
    ]
    header = ["figure", "measured", f"in {base_name}"]
    output.table(header, rows, right=[1, 2])
    for name in found.kept:
        output.note(f"{name} was not measured, and stays as in {base_name}")


def _names(measured: Any) -> list[str]:
    found = []
    for key, value in measured.items():
        found += [f"{key}.{part}" for part in value] if isinstance(value, dict) else []
        found += [key] if isinstance(value, int | float) else []
    return found


def _at(table: Any, name: str) -> float:
    value = table["measured"]
    for key in name.split("."):
        value = value[key]
    return value


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.2f}" if whole else ""


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.4g} ms"
