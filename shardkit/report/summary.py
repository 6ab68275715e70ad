"""What is left of a run when it is over: `summary.json` and the closing table."""

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from shardkit.version import __version__

__all__ = ["summarize", "summary_rows", "versions"]

_PACKAGES = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
}


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of what computes; None if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, package in _PACKAGES.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[name] = None
    # Of the code that runs, which may be a checkout that is not installed.
    found["shardkit"] = __version__
    return found


def summarize(
    records: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    eval_loss: float | None,
    state_digest: str,
    corpus_digest: str | None,
) -> dict[str, Any]:
    """Builds the summary of a run, whole, however often it was resumed.

    Args:
        records: What `read_records` returned.
        steps: Number of steps that the run has made.
        eval_loss: Loss on the validation batches; None if there were none.
        state_digest: Digest of the logical state.
        corpus_digest: Digest of the corpus; None if it has none.
    """
    trained = [r for r in records if "event" not in r]
    changes = [r for r in records if r.get("event") == "reconfigure"]
    num_ready = sum(bool(r.get("was_ready")) for r in changes)
    return {
        "steps": steps,
        "final_loss": trained[-1]["loss"] if trained else None,
        "final_loss_bits": trained[-1]["loss_bits"] if trained else None,
        "eval_loss": eval_loss,
        "state_digest": state_digest,
        "num_reconfigurations": len(changes),
        "standby_hit_rate": num_ready / len(changes) if changes else None,
        "corpus_digest": corpus_digest,
        "versions": versions(),
    }


def summary_rows(summary: Mapping[str, Any]) -> dict[str, str]:
    """Returns what the closing table shows of a summary, whose digests are whole."""
    corpus, rate = summary["corpus_digest"], summary.get("standby_hit_rate")
    rows = {
        "steps": str(summary["steps"]),
        "final loss": _loss(summary["final_loss"]),
        "validation loss": _loss(summary["eval_loss"]),
        "changes of devices": str(summary["num_reconfigurations"]),
        "of these prepared": None if rate is None else f"{rate:.0%}",
        "state digest": summary["state_digest"],
        "corpus digest": corpus and _short(corpus),
    }
    return {name: value for name, value in rows.items() if value is not None}


def _short(digest: str) -> str:
    # A row of a table should fit into 80 columns.
    return digest if len(digest) <= 32 else f"{digest[:16]}…"


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
