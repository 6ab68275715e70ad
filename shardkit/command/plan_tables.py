"""How a plan is shown: tables for people, one document for machines.

Owns the words and the order. It computes nothing but ratios.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardkit.command.output import Output
from shardkit.command.plan_findings import Findings
from shardkit.config import RunConfig
from shardkit.planner.choice import Choice, Plan
from shardkit.planner.search import KEPT_PART
from shardkit.words import format_bytes, format_mesh, format_microbatches, format_time

__all__ = ["document", "show"]

_NUM_OTHERWISE = 6
_RIVALS = ["mesh", "step", "memory", "bits", "why not"]
_KINDS = {
    "params": "its part of the parameters",
    "optimizer": "its part of the optimizer's state",
    "model state": "what the model carries on beside",
    "batch": "its microbatches of a step",
    "gathered": "all parameters, for a step",
    "sums": "of the gradients so far",
    "gradient": "of one microbatch",
    "activations": "of one microbatch, estimated",
    "adding up": "more, while sums are exchanged",
    "other": "counters and the like",
}


def document(
    found: Findings, arguments: argparse.Namespace, config: RunConfig
) -> dict[str, Any]:
    """Returns all of it as plain values."""
    best, after, profile = found.plan.best, found.after, found.profile
    report: dict[str, Any] = {
        "config": str(arguments.config),
        "model": {
            "factory": config.model.factory,
            "num_params": found.facts.num_params,
            "notes": list(found.facts.notes),
        },
        "devices": found.topology.num_devices,
        "devices_per_host": found.topology.devices_per_host,
        "profile": {
            "name": arguments.profile,
            "device": profile.name,
            "measured_by": profile.measured_by,
            "is_measured": _is_measured(found),
        },
        "hbm_bytes": profile.memory_bytes,
        "limit_bytes": found.limit_bytes,
        "global_batch_size": found.job.global_batch_size,
        "num_microbatches": best.num_microbatches,
        "consistency": _sums(found),
        "plan": _plan_document(found, found.plan, found.current),
        "otherwise": [
            {**_choice_document(found, x, found.current), "why": found.why_not(x)}
            for x in found.otherwise
        ],
        "collectives": found.collectives(best),
        "current": {
            **_choice_document(found, found.current, best),
            "fits": found.current.memory_bytes <= found.limit_bytes,
        },
        "after_loss": None,
    }
    if after is not None:
        report["after_loss"] = {
            "num_lost": arguments.what_if_lose,
            "remaining_steps": config.train.steps,
            "moving_s": after.move_s,
            "remaining_s": after.remaining_s,
            "consistency": found.consistency(best, after.best),
            "plan": _plan_document(found, after.plan, best),
        }
    return report


def _plan_document(found: Findings, plan: Plan, old: Choice) -> dict[str, Any]:
    def others(pairs: Any) -> list[dict[str, Any]]:
        return [{**_choice_document(found, x, old), "why": why} for x, why in pairs]

    return {
        "best": _choice_document(found, plan.best, old),
        "runners_up": others(plan.runners_up),
        "too_large": others(plan.too_large),
        "num_idle": plan.num_idle,
        "notes": list(plan.notes),
        "num_predicted": plan.num_predicted,
    }


def _choice_document(found: Findings, choice: Choice, old: Choice) -> dict[str, Any]:
    """One mesh, and what becomes of the bits of a run between it and another one."""
    return {
        "mesh": dict(choice.sizes),
        "remat": choice.remat,
        "offload": choice.offload,
        "num_microbatches": choice.num_microbatches,
        "num_devices": choice.num_devices,
        "rounds": choice.rounds,
        "most_microbatches": choice.most,
        "step_s": choice.step_s,
        "time_s": dict(choice.time_s),
        "memory_bytes": choice.memory_bytes,
        "memory": dict(choice.memory),
        "sent_bytes": dict(choice.sent_bytes),
        "mfu": found.mfu(choice),
        "consistency": found.consistency(old, choice),
    }


def show(
    found: Findings, arguments: argparse.Namespace, config: RunConfig, output: Output
) -> None:
    """Writes all of it as tables."""
    best = found.plan.best
    num, per_host = found.topology.num_devices, found.topology.devices_per_host
    hosts = f", {per_host} to a host" if num > per_host else ""
    output.line(f"{arguments.config} on {num} devices{hosts}", style="bold")
    output.facts(_facts(found, arguments, config))
    _notes(found.plan.notes, output)
    output.line()
    output.table(_RIVALS, [*_rivals(found)], right=[1, 2])
    output.line()
    if found.otherwise:
        _show_otherwise(found, output)
        output.line()
    output.table(
        ["memory of a device", "bytes", "part", "of what"],
        [*_shares(best.memory, format_bytes, _KINDS)],
        right=[1, 2],
    )
    output.line()
    output.table(
        ["time of a step", "predicted", "part"],
        [*_shares(best.time_s, _format_s, {})],
        right=[1, 2],
    )
    output.line()
    _show_collectives(found, best, output)
    if found.after is not None:
        output.line()
        _show_loss(found, arguments, config, output)
    output.line()
    _notes(found.facts.notes, output)
    output.prose(
        "Times are predictions: what is reached of the profile's peaks is measured by "
        f"{found.profile.measured_by}."
    )


def _facts(
    found: Findings, arguments: argparse.Namespace, config: RunConfig
) -> dict[str, str]:
    best, profile, job = found.plan.best, found.profile, found.job
    microbatches = format_microbatches(best.num_microbatches)
    ramp = "" if config.data.batch_ramp is None else ", the ramp's largest"
    mesh = format_mesh(found.current.sizes)
    if found.current.is_same(best):
        change = "the same mesh, nothing to change"
        if config.mesh.auto:
            change = "the one that is chosen, with auto = true"
    else:
        change = _class_words(found, found.current, best)
    facts = {
        "model": f"{config.model.factory}, {found.facts.num_params:,} parameters",
        "a step": f"{job.global_batch_size} rows in {microbatches}{ramp}; sums "
        f"{_sums(found)}",
        "device": f"{profile.name} (--profile {arguments.profile})",
        "memory": f"{format_bytes(profile.memory_bytes)}, of which a step may take "
        f"{format_bytes(found.limit_bytes)}, {KEPT_PART:.0%}",
        "best mesh": found.spell(best),
        "step time": f"{_format_s(best.step_s)}, MFU {found.mfu(best):.0%}, predicted",
        "peak memory": f"{format_bytes(best.memory_bytes)} on a device",
        "config's mesh": f"{mesh}: {change}",
    }
    return facts


def _rivals(found: Findings) -> Iterator[tuple[str, ...]]:
    """The meshes that were compared, the config's among them."""
    plan, current = found.plan, found.current
    rows = [(plan.best, "chosen"), *plan.runners_up, *plan.too_large]
    if not any(choice.is_same(current) for choice, _ in rows):
        rows.append((current, found.why_not(current)))
    for choice, why in rows:
        own = "; the config's mesh" if choice.is_same(current) else ""
        yield _rival(found, current, choice, why + own)


def _rival(found: Findings, old: Choice, choice: Choice, why: str) -> tuple[str, ...]:
    step, memory = _format_s(choice.step_s), format_bytes(choice.memory_bytes)
    return found.spell(choice), step, memory, found.consistency(old, choice), why


def _show_otherwise(found: Findings, output: Output) -> None:
    """The chosen mesh with all else that could be chosen."""
    best, current = found.plan.best, found.current
    shown = list(found.otherwise[:_NUM_OTHERWISE])
    own = [x for x in found.otherwise if x.beside == current.beside]
    shown += [x for x in own if x not in shown]
    rows = [
        (
            found.spell_beside(choice) or "no offload",
            _format_s(choice.step_s),
            format_bytes(choice.memory_bytes),
            found.consistency(current, choice),
            "chosen" if choice.is_same(best) else found.why_not(choice),
        )
        for choice in shown
    ]
    header = [f"{format_mesh(best.sizes)} with", *_RIVALS[1:]]
    output.table(header, rows, right=[1, 2])
    if more := len(found.otherwise) - len(rows):
        output.line(f"and {more} more, which --json has")


def _shares(
    table: Mapping[str, float], spell: Any, words: Mapping[str, str]
) -> Iterator[tuple[str, str, str, str]]:
    total = sum(table.values())
    for name, value in sorted(table.items(), key=lambda entry: -entry[1]):
        if value > 0:
            name = name.replace("over ", "exchange over ")
            part = f"{value / total:.0%}" if value >= total / 200 else "<1%"
            yield name, spell(value), part, words.get(name, "")
    yield "together", spell(total), "", ""


def _show_collectives(found: Findings, best: Choice, output: Output) -> None:
    rows = [
        (
            row["axis"],
            row["collective"],
            format_bytes(row["buffer_bytes"]),
            format_bytes(row["sent_bytes"]),
            ", ".join(row["of"]),
        )
        for row in found.collectives(best)
    ]
    if not rows:
        output.line("Nothing is exchanged in a step.")
        return
    header = ["axis", "collective", "buffers", "a device sends", "of what"]
    output.table(header, rows, right=[2, 3])


def _show_loss(
    found: Findings, arguments: argparse.Namespace, config: RunConfig, output: Output
) -> None:
    after, old = found.after, found.plan.best
    assert after is not None
    best, lost = after.best, arguments.what_if_lose
    output.line(
        f"Without {lost} of these {found.topology.num_devices} devices", style="bold"
    )
    slower = best.step_s / old.step_s
    num = found.topology.num_devices - lost
    facts = {
        "best mesh": format_mesh(best.sizes),
        "step time": f"{_format_s(best.step_s)}, ×{slower:.2f}; MFU "
        f"{found.mfu(best):.0%}, predicted",
        "peak memory": f"{format_bytes(best.memory_bytes)} on a device",
        "moving": f"{_format_s(after.move_s)} once, weighed against "
        f"{config.train.steps:,} steps",
        "bits": _class_words(found, old, best),
        "idle": f"{after.plan.num_idle or 'none'} of {num} devices",
    }
    output.facts(facts)
    _notes(after.plan.notes, output)
    output.line()
    others = [(best, "chosen"), *after.plan.runners_up, *after.plan.too_large]
    rows = [_rival(found, old, choice, why) for choice, why in others]
    output.table(_RIVALS, rows, right=[1, 2])


def _notes(notes: Sequence[str], output: Output) -> None:
    for note in notes:
        output.remark(note)


def _class_words(found: Findings, old: Choice, new: Choice) -> str:
    words = {
        "exact": "the run keeps its bits",
        "equivalent": "equal to rounding",
        "another run": "with other microbatches",
    }
    found_class = found.consistency(old, new)
    return f"{found_class}, {words[found_class]}"


def _sums(found: Findings) -> str:
    return "exact" if found.job.exact else "fast"


def _is_measured(found: Findings) -> bool:
    return not found.profile.measured_by.startswith("nobody")


def _format_s(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return format_time(seconds * 1e3)
