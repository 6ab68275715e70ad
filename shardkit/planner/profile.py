"""What a machine can do, as its vendor says and as was measured.

Owns `HardwareProfile`, its TOML files and what is wrong with one. Invariant: figures of
a datasheet and measured ones are never mixed: peaks are the vendor's, and what is
reached of them is a factor of its own that says who measured it. It measures nothing.
"""

import dataclasses
import importlib.resources
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardkit.errors import ConfigError

__all__ = [
    "ALONE",
    "LINKS",
    "HardwareProfile",
    "Link",
    "load_profile",
    "profile_names",
    "profile_of_kind",
    "profile_table",
    "read_profile",
]

LINKS = ("inside", "between", "offload")
"""Between the devices of a host, between hosts, and to a device's own host memory."""

ALONE = ("products", "others")
"""Matrix products and convolutions, and all that is between them."""

_KINDS = {
    r"\bh100\b": "h100",
    r"\bh200\b": "h200",
    r"\bv5 ?lite\b|\bv5e\b": "v5e",
    r"\bv5p?\b": "v5p",
    r"^cpu$": "cpu",
}
"""What JAX calls a kind of device → the profile of it; the first that is found."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """A way for bytes, as it was found to be.

    Attributes:
        bandwidth_bytes_s: What one device sends at most; as much comes in meanwhile.
        latency_s: What a collective takes for every doubling of its devices.
    """

    bandwidth_bytes_s: float
    latency_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """One kind of device, its hosts and its links.

    Attributes:
        name: What it is.
        devices_per_host: How many share a host.
        memory_bytes: The memory of a device.
        memory_bandwidth_bytes_s: Of that memory.
        peak_flops_s: Dtype → operations of matrix products in a second at most.
        is_shared: Whether the devices of a host are its threads: all figures are then
            those of the host, which the devices in use divide among them.
        links: `LINKS` → what one device gets of it.
        flops_fraction: Dtype → what large products reach of the peak.
        product_overhead_s: What any product takes beside its work, and what is fused
            around it: small ones reach less of the peak.
        memory_fraction: What is reached of the bandwidth of memory.
        written_fraction: What operations other than products write costs, beside
            writing and reading it: less where they are fused, more where they compute.
        fresh_byte_s: What a byte of memory takes that a step is given anew, where
            pages are made when they are first used: 0 on accelerators.
        alone_fraction: `ALONE` → what one device has of a shared host if no other is
            busy: products may use its cores even so.
        step_overhead_s: What a step takes on any number of devices.
        microbatch_overhead_s: What a microbatch takes beside its work.
        start_s: What it takes to change over to another mesh beside moving the state.
        measured_by: Who found the fractions and latencies, and how.
    """

    name: str
    devices_per_host: int
    memory_bytes: float
    memory_bandwidth_bytes_s: float
    peak_flops_s: Mapping[str, float]
    is_shared: bool
    links: Mapping[str, Link]
    flops_fraction: Mapping[str, float]
    product_overhead_s: float
    memory_fraction: float
    written_fraction: float
    fresh_byte_s: float
    alone_fraction: Mapping[str, float]
    step_overhead_s: float
    microbatch_overhead_s: float
    start_s: float
    measured_by: str

    def peak(self, dtype: str) -> float:
        """The peak for a dtype; for one that is not named, that of float32."""
        return self.peak_flops_s.get(dtype, self.peak_flops_s["float32"])

    def flops_s(self, dtype: str) -> float:
        """What large products of a dtype reach."""
        fractions = self.flops_fraction
        return self.peak(dtype) * fractions.get(dtype, fractions["float32"])

    @property
    def memory_bytes_s(self) -> float:
        """What is reached of the bandwidth of memory."""
        return self.memory_bandwidth_bytes_s * self.memory_fraction


_DATASHEET = ("devices_per_host", "memory_bytes", "memory_bandwidth_bytes_s")
_SECONDS = (
    "product_overhead_s",
    "fresh_byte_s",
    "step_overhead_s",
    "microbatch_overhead_s",
    "start_s",
)


def profile_names() -> list[str]:
    """The profiles that come with shardkit.

    Example:
        >>> profile_names()
        ['cpu', 'h100', 'h200', 'v5e', 'v5p']
    """
    folder = importlib.resources.files("shardkit.planner") / "profiles"
    names = [entry.name for entry in folder.iterdir()]
    return sorted(n.removesuffix(".toml") for n in names if n.endswith(".toml"))


def profile_of_kind(kind: str) -> str | None:
    """The profile of a kind of device, as JAX calls it; None if there is none.

    Example:
        >>> profile_of_kind("NVIDIA H200"), profile_of_kind("NVIDIA GH200 480GB")
        ('h200', None)
    """
    found = (n for pattern, n in _KINDS.items() if re.search(pattern, kind.lower()))
    return next(found, None)


def load_profile(name: str | Path) -> HardwareProfile:
    """Loads a profile.

    Args:
        name: One of `profile_names`, or the path of a TOML file.

    Raises:
        ConfigError: If there is none, or naming all that is wrong with it.

    Example:
        >>> load_profile("h200").devices_per_host
        8
    """
    table, where = profile_table(name)
    return read_profile(table, where)


def profile_table(name: str | Path) -> tuple[dict[str, Any], str]:
    """Reads a profile's file, and returns also where it was; see `load_profile`."""
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in profile_names():
            raise ConfigError(
                f"profile: expected {', '.join(profile_names())} or the path of a TOML "
                f"file, found {str(name)!r}"
            )
        folder = importlib.resources.files("shardkit.planner") / "profiles"
        path = Path(str(folder / f"{name}.toml"))
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), str(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def read_profile(table: Mapping[str, Any], where: str) -> HardwareProfile:
    """Makes a profile of the table in its file.

    Args:
        table: The table.
        where: What an error calls it.

    Raises:
        ConfigError: Naming all that is wrong with it.
    """
    problems: list[str] = []
    root = _Table(table, "", problems)
    name = root.text("name")
    sheet, measured = root.table("datasheet"), root.table("measured")
    peaks = sheet.table("peak_flops_s")
    peak_flops_s = {dtype: peaks.number(dtype) for dtype in {"float32", *peaks.given}}
    speeds = sheet.table("bandwidth_bytes_s")
    reached, latencies = measured.table("link_fraction"), measured.table("latency_s")
    links = {
        link: Link(
            bandwidth_bytes_s=speeds.number(link) * reached.number(link, most=1.0),
            latency_s=latencies.number(link, least=0.0),
        )
        for link in LINKS
    }
    values: dict[str, Any] = {key: sheet.number(key) for key in _DATASHEET}
    values["memory_fraction"] = measured.number("memory_fraction", most=1.0)
    alone = measured.table("alone_fraction")
    values["alone_fraction"] = {part: alone.number(part, most=1.0) for part in ALONE}
    values |= {key: measured.number(key, least=0.0) for key in _SECONDS}
    values["written_fraction"] = measured.number("written_fraction", least=0.0)
    products = measured.table("flops_fraction")
    values["flops_fraction"] = {
        dtype: products.number(dtype, most=1.0)
        for dtype in {"float32", *products.given}
    }
    for dtype in sorted(values["flops_fraction"].keys() - peak_flops_s.keys()):
        problems.append(
            f"measured.flops_fraction.{dtype}: there is no peak of it in "
            "datasheet.peak_flops_s"
        )
    if values["devices_per_host"] % 1:
        found = sheet.given.get("devices_per_host")
        problems.append(
            f"datasheet.devices_per_host: expected a whole number, found {found!r}"
        )
    values["is_shared"] = sheet.flag("is_shared")
    values["measured_by"] = measured.text("by")
    inner = (peaks, speeds, products, alone, reached, latencies)
    for part in (root, sheet, measured, *inner):
        part.refuse_the_rest()
    if problems:
        raise ConfigError(f"{where}:" + "".join(f"\n  {line}" for line in problems))
    values["devices_per_host"] = int(values["devices_per_host"])
    return HardwareProfile(name=name, peak_flops_s=peak_flops_s, links=links, **values)


class _Table:
    """One table of a file, which remembers what was asked for."""

    def __init__(self, given: Any, path: str, problems: list[str]) -> None:
        self.given = given if isinstance(given, Mapping) else {}
        self._path, self._problems, self._asked = path, problems, set[str]()
        if not isinstance(given, Mapping):
            problems.append(f"{path}: expected a table, found {given!r}")

    def table(self, key: str) -> "_Table":
        self._asked.add(key)
        return _Table(self.given.get(key), self._at(key), self._problems)

    def number(self, key: str, *, least: float = 1e-300, most: float = 1e300) -> float:
        value = self._get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= most or math.isnan(value):
            limits = "at least 0" if least == 0 else "more than 0"
            limits += f" and at most {most:g}" if most < 1e300 else ""
            self._expected(key, f"a number, {limits}", value)
            return 1.0
        return float(value)

    def text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str) or not value:
            self._expected(key, "text", value)
        return str(value)

    def flag(self, key: str) -> bool:
        value = self._get(key, False)
        if not isinstance(value, bool):
            self._expected(key, "true or false", value)
        return bool(value)

    def refuse_the_rest(self) -> None:
        for key in self.given:
            if key not in self._asked:
                self._problems.append(f"{self._at(key)}: there is no such figure")

    def _get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        return self.given.get(key, default)

    def _at(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _expected(self, key: str, what: str, found: Any) -> None:
        shown = "nothing" if found is None else repr(found)
        self._problems.append(f"{self._at(key)}: expected {what}, found {shown}")
