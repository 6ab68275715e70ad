"""Directories of runs that were never run."""

import dataclasses
import json
import struct

from reported import CHANGE, CONFIG

from shardkit.config import to_toml

VERSIONS = {"python": "3.11", "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "1"}
FACTS = {"platform": "cpu", "device": "cpu", "threads": "8", "versions": VERSIONS}
LEAVES = [
    ("params/w", (7, 130), [["fsdp"], []], ["embed", "mlp"]),
    ("params/b", (130,), [[]], None),
    ("opt_state/0/count", (), [], None),
]


def bits(loss):
    """The float32 of a loss, as 8 hex digits."""
    return struct.pack(">f", loss).hex()


def changed(config=CONFIG, **sections):
    """A config with other values: `train={"seed": 3}`."""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **values)
            for name, values in sections.items()
        },
    )


def loss_of(step):
    return 2.0 / (1 + step / 8)


def step_line(step, loss=None, **fields):
    value = loss_of(step) if loss is None else loss
    small = CHANGE["step"] <= step
    return {
        "step": step,
        "loss": value,
        "loss_bits": bits(value),
        "num_devices": 3 if small else 8,
        "mesh": CHANGE["to_mesh"] if small else CHANGE["from_mesh"],
        "step_s": None if step in (0, 5) else 0.01 * (1 + step % 3),
        "tokens_per_s": None if step in (0, 5) else 800.0,
        **fields,
    }


def write_lines(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def store_run(
    path,
    *,
    steps=20,
    config=CONFIG,
    lines=None,
    facts=FACTS,
    digest="aa" * 16,
    corpus_digest=None,
    leaves=LEAVES,
    source=None,
    is_finished=True,
    notices=(),
):
    """Writes what a run of eight devices, of which five go at step 5, leaves."""
    path.mkdir()
    (path / "config.toml").write_text(to_toml(config))
    records = [step_line(step) for step in range(steps)] if lines is None else lines
    change = {"event": "reconfigure", **CHANGE}
    first = {"event": "first_step", "step": 5, "start_s": 0.3, "end_s": 0.4}
    evals = [{"event": "eval", "step": at, "loss": 2.5 - at / 10} for at in (5, 10)]
    write_lines(
        path / "metrics.jsonl", [*records[:5], change, first, *records[5:], *evals]
    )
    events = [
        {"event": "begin", "step": 0, "unix_s": 1.7e9, "source": source},
        {"event": "environment", "step": 0, "facts": facts},
        {
            "event": "mesh",
            "step": 0,
            "mesh": CHANGE["from_mesh"],
            "device_ids": [0, 1, 2, 3, 4, 5, 6, 7],
        },
        {"event": "mesh", "step": 5, "mesh": {"fsdp": 3}, "device_ids": [4, 0, 2]},
        {"event": "checkpoint", "step": 10, "unix_s": 1.7e9 + 9},
        *({"event": "notice", "step": 7, "message": text} for text in notices),
    ]
    events[1]["corpus_digest"] = corpus_digest
    write_lines(path / "events.jsonl", events)
    if leaves is not None:
        rows = [
            {
                "path": name,
                "shape": shape,
                "dtype": "float32",
                "cuts": cuts,
                "axes": axes,
            }
            for name, shape, cuts, axes in leaves
        ]
        (path / "layout.json").write_text(json.dumps({"leaves": rows}))
    if is_finished:
        summary = {"steps": steps, "state_digest": digest, "versions": VERSIONS}
        summary |= {"eval_loss": 1.5, "corpus_digest": corpus_digest}
        (path / "summary.json").write_text(json.dumps(summary))
    return path
