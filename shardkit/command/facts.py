"""What is known of a checkpoint besides its leaves, in words.

Owns the lines above the table of `inspect`. They come from files of others, so
nothing is taken to be of the type that it should be.
"""

from collections.abc import Mapping
from typing import Any

from shardkit.checkpoint.manifest import Manifest
from shardkit.checkpoint.mapping import counted
from shardkit.report.terminal import format_bytes, format_mesh

__all__ = ["format_facts"]

_MOST_CHARACTERS = 32


def format_facts(
    report: Mapping[str, Any], manifest: Manifest | None
) -> dict[str, str]:
    """Writes names and values.

    Args:
        report: What `inspect` reports.
        manifest: What was saved beside the arrays, if anything.
    """
    steps = ", ".join(map(str, report["steps"]))
    others = f" (there are {steps})" if len(report["steps"]) > 1 else ""
    total = f"{counted(report['num_leaves'], 'leaf')}, {format_bytes(report['bytes'])}"
    if manifest is None:
        return {"format": f"{report['format']}, without checksums", "state": total}
    versions = manifest.fingerprint
    where = [format_mesh(_sizes(manifest.mesh))] if manifest.mesh else []
    where += [f"jax {versions['jax']}"] if "jax" in versions else []
    where += [f"{versions['platform']}"] if "platform" in versions else []
    rows = {
        "step": f"{manifest.step}{others}",
        "state": f"{total}, digest {manifest.digest}",
        "saved on": ", ".join(where),
        "data": _spell(manifest.data),
        "metrics": _spell(manifest.metrics),
        "random": _spell(manifest.random),
        "run": _spell({k: v for k, v in manifest.run.items() if k != "config"}),
    }
    return {name: text for name, text in rows.items() if text}


def _sizes(mesh: Any) -> dict[str, int]:
    return {axis: size for axis, size in mesh.items() if isinstance(size, int)}


def _spell(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shorten(value)}" for name, value in table.items())


def _shorten(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:16]}…"
