"""`shardkit plan`: which mesh to train a config on, before there are any devices.

Owns the command line of it. What the planner is asked is `plan_job`'s business, what it
answers that of `plan_findings`, how that is shown that of `plan_tables`. No device is
used.
"""

import argparse
import dataclasses
from pathlib import Path

from shardkit import config as configs
from shardkit.command.options import (
    MESH_AXES,
    add_devices,
    device_count,
    number,
    numbers,
)
from shardkit.command.output import Output
from shardkit.errors import ConfigError
from shardkit.planner.profile import load_profile, profile_names

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "predict which mesh a config trains fastest on, from shapes alone"
EPILOG = """\
No accelerator is needed, and no data but those of a factory of your own.
docs/planning.md says what is predicted, and what nobody has measured yet.

  shardkit plan configs/llama_1b.toml --devices 8 --hbm 80GB
  shardkit plan configs/llama_1b.toml --devices 8 --profile h200 --what-if-lose 1

exit codes:
  0    there is a mesh that fits
  2    none fits, or bad input: a message says what would do
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    parser.add_argument("config", metavar="CONFIG.toml", type=Path)
    add_devices(parser)
    parser.add_argument(
        "--hbm",
        metavar="SIZE",
        type=_size,
        help="the memory of a device, such as 80GB [mesh.memory, or the profile's]",
    )
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help=f"what a device can do: {', '.join(profile_names())}, or a file of yours "
        "(.toml) [mesh.profile of the config, or h100]",
    )
    parser.add_argument(
        "--devices-per-host",
        metavar="N",
        type=number(1),
        help="how many share a host [the profile's]",
    )
    parser.add_argument(
        "--what-if-lose",
        metavar="K",
        type=number(1),
        help="also plan how to go on with K devices fewer",
    )
    parser.add_argument(
        "--axes",
        metavar="LIST",
        type=_axes,
        help=f"whose sizes to look for, of {','.join(MESH_AXES)}; of the others, data "
        "and fsdp are 1 and the rest as in the config [all that the model can use]",
    )
    parser.add_argument(
        "--remat",
        metavar="OPTION",
        nargs="?",
        const="remat",
        help="also try the model with this option of its factory on and off; [remat]",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="also try the optimizer's state in host memory between updates",
    )
    parser.add_argument(
        "--microbatches",
        metavar="LIST",
        type=_microbatches,
        help="also try these numbers of microbatches, such as 8,16, or any that "
        "divides a step; each makes another run",
    )
    parser.add_argument(
        "--speeds",
        metavar="LIST",
        type=numbers,
        help="how fast each device is beside the others, such as 1,1,0.5,0.5",
    )
    parser.add_argument(
        "--consistency",
        choices=("exact", "fast"),
        help="keep the bits, or not [train.consistency of the config]",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Plans one config."""
    config = configs.load(arguments.config)
    mesh = config.mesh
    arguments.profile = arguments.profile or mesh.profile or "h100"
    profile = load_profile(arguments.profile)
    memory = arguments.hbm or mesh.memory_bytes or profile.memory_bytes
    num_devices = device_count(arguments, config.devices)
    speeds = _speeds(arguments, num_devices)
    if arguments.offload and (profile.is_shared or config.train.offload):
        why = "the config has train.offload = true; without it both are tried"
        if profile.is_shared:
            why = "emulated devices are in the host's memory already"
        raise ConfigError(f"--offload: {why}")
    num_lost = arguments.what_if_lose or 0
    if num_lost >= num_devices:
        raise ConfigError(
            f"--what-if-lose: expected fewer than the {num_devices} devices that there "
            f"are, found {num_lost}"
        )
    # What follows needs JAX, and what is above is refused without waiting for that.
    from shardkit import build
    from shardkit.command.plan_findings import find
    from shardkit.command.plan_job import Choices, find_modules, read_job
    from shardkit.command.plan_tables import document, show
    from shardkit.planner.meshes import Topology

    find_modules()
    asked = build.build_mesh(mesh)
    found = find(
        read_job(
            config,
            arguments.consistency or config.train.consistency,
            axes=arguments.axes,
            choices=Choices(
                remat=arguments.remat,
                offload=arguments.offload,
                num_microbatches=arguments.microbatches,
            ),
            platform="cpu" if profile.is_shared else "gpu",
        ),
        Topology(
            num_devices,
            arguments.devices_per_host or profile.devices_per_host,
            speeds,
        ),
        dataclasses.replace(profile, memory_bytes=memory),
        current=None if mesh.auto else asked.sizes(num_devices),
        num_lost=num_lost,
        keeps_groups=not mesh.allow_equivalent,
        remaining_steps=config.train.steps,
    )
    if output.as_json:
        output.document(document(found, arguments, config))
    else:
        show(found, arguments, config, output)
    return 0


def _speeds(arguments: argparse.Namespace, num_devices: int) -> tuple[float, ...]:
    speeds: tuple[float, ...] = tuple(arguments.speeds or ())
    if speeds and (len(speeds) != num_devices or min(speeds) <= 0):
        raise ConfigError(
            f"--speeds: expected a number above 0 for each of {num_devices} devices, "
            f"found {len(speeds)}: {', '.join(f'{speed:g}' for speed in speeds)}"
        )
    # As they are beside the others: the fastest does what the profile says.
    return tuple(speed / max(speeds) for speed in speeds)


def _microbatches(text: str) -> list[int]:
    """Reads numbers; none for any.

    >>> _microbatches("8,16"), _microbatches("any")
    ([8, 16], [])
    """
    parse = number(1)
    return [] if text == "any" else [parse(each) for each in text.split(",")]


def _axes(text: str) -> tuple[str, ...]:
    """Reads names of mesh axes.

    >>> _axes("data,fsdp")
    ('data', 'fsdp')
    """
    names = tuple(name.strip() for name in text.split(","))
    wrong = [name for name in names if name not in MESH_AXES]
    if wrong:
        raise argparse.ArgumentTypeError(
            f"expected some of {','.join(MESH_AXES)}, such as data,fsdp; found {text!r}"
        )
    return names


def _size(text: str) -> float:
    try:
        return configs.parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
