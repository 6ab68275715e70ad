"""What the planner predicts of meshes, beside what XLA makes of them.

    python benchmarks/predicted_placements.py [--only NUMBER ...] [--write FILE]

For each pair of a model and a mesh of up to eight emulated devices a step is compiled,
and nothing run. Memory is that of one device: predicted from shapes alone, predicted
with one compilation of one microbatch, and XLA's. Collectives are compared by axes,
kind and size, one by one; what does not match is told with its class.
"""

import argparse
import collections
import dataclasses
import math
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

ROWS, LENGTH, NUM_MICROBATCHES = 4, 32, 6
BATCH, GROUP = ("data", "fsdp"), ("tensor", "expert", "context")

SMALL = {"num_layers": 2, "embed_dim": 64, "mlp_dim": 192, "vocab_size": 256}
LLAMA = {**SMALL, "scan_layers": True}
GPT2 = {**SMALL, "norm": "layer", "mlp": "gelu", "positions": "learned"}
GPT2 |= {"use_bias": True, "tie_embeddings": False}
EXPERTS = {"num_layers": 2, "embed_dim": 64, "mlp_dim": 96}
MODELS = {
    "llama": ("gpt", LLAMA),
    "gpt2": ("gpt", GPT2),
    "sequence": ("gpt", {**LLAMA, "remat": True, "sequence_parallel": True}),
    "grouped": ("gpt", {**SMALL, "num_kv_heads": 2, "remat": True}),
    "experts": ("moe", EXPERTS),
    "by rows": ("moe", {**EXPERTS, "capacity_per_row": True}),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model on a mesh.

    Attributes:
        model: Of `MODELS`.
        mesh: Axis → size.
        exact: Whether sums keep their bits.
        classes: Of `CLASSES`, how XLA's collectives differ from those predicted.
    """

    model: str
    mesh: dict
    exact: bool
    classes: str = ""


HOISTED = "numbers once routing seams"
PAIRS = [
    Pair("llama", {"fsdp": 8}, True),
    Pair("llama", {"data": 2, "fsdp": 3}, False),
    Pair("llama", {"fsdp": 4, "tensor": 2}, True, "digits"),
    Pair("llama", {"fsdp": 2, "tensor": 4}, False),
    Pair("llama", {"fsdp": 3, "tensor": 2}, True, "digits"),
    Pair("llama", {"data": 2, "context": 4}, True, "numbers seams"),
    Pair("llama", {"fsdp": 2, "context": 2}, False, "numbers seams"),
    Pair("llama", {"data": 2, "fsdp": 2, "context": 2}, True, "numbers seams"),
    Pair("llama", {"fsdp": 2, "tensor": 2, "context": 2}, True, "digits numbers seams"),
    Pair("llama", {"tensor": 4, "context": 2}, False, "numbers seams"),
    Pair("gpt2", {"data": 8}, True),
    Pair("gpt2", {"fsdp": 2, "tensor": 2}, True, "digits"),
    Pair("gpt2", {"data": 2, "tensor": 4}, False),
    Pair("gpt2", {"data": 2, "fsdp": 2, "context": 2}, True, "numbers seams"),
    Pair("gpt2", {"tensor": 2, "context": 2}, True, "digits numbers seams"),
    Pair("sequence", {"fsdp": 2, "tensor": 2}, True, "digits sides"),
    Pair("sequence", {"fsdp": 2, "tensor": 4}, False, "sides"),
    Pair(
        "sequence",
        {"fsdp": 2, "tensor": 2, "context": 2},
        True,
        "digits numbers seams sides",
    ),
    Pair("grouped", {"fsdp": 4, "tensor": 2}, True, "digits"),
    Pair("grouped", {"data": 2, "context": 2}, True, "numbers seams"),
    Pair("grouped", {"tensor": 2, "context": 2}, False, "numbers seams"),
    Pair("experts", {"data": 2, "fsdp": 4}, True),
    Pair("experts", {"fsdp": 2, "tensor": 2}, True, "digits"),
    Pair("experts", {"fsdp": 2, "expert": 2}, True, "numbers routing"),
    Pair("experts", {"data": 2, "expert": 4}, False, "numbers routing"),
    Pair("experts", {"fsdp": 2, "context": 2}, True, "numbers seams"),
    Pair(
        "experts", {"fsdp": 2, "tensor": 2, "expert": 2}, True, "digits numbers routing"
    ),
    Pair("experts", {"expert": 2, "context": 2}, False, "numbers routing seams"),
    Pair("by rows", {"fsdp": 4, "tensor": 2}, True, "digits"),
    Pair("by rows", {"data": 2, "expert": 2}, True),
    Pair("by rows", {"fsdp": 2, "expert": 4}, False),
    Pair("by rows", {"data": 2, "fsdp": 2, "context": 2}, True, "numbers seams"),
    Pair("by rows", {"fsdp": 2, "tensor": 2, "expert": 2}, True, "digits"),
    Pair("by rows", {"fsdp": 2, "expert": 2, "context": 2}, True, HOISTED),
    Pair("by rows", {"tensor": 2, "expert": 2, "context": 2}, False, HOISTED),
]
CLASSES = {
    "digits": "exact norms: XLA sends three of the four digits of some matrices",
    "numbers": "token ids, masks and places of experts: XLA cuts them like what they "
    "are computed with and joins them again; they are predicted whole",
    "once": "what follows from parameters alone XLA does before the loop over "
    "microbatches",
    "routing": "XLA cuts the routing by the axis of the experts too, and gathers "
    "tokens where sums of places were predicted",
    "seams": "a slice or pad of a cut dim: what lies next to a seam goes to a "
    "neighbour",
    "sides": "positions that are cut by two axes, or by the one that cuts heads: XLA "
    "gathers other operands, and over both axes at once",
    "unknown": "not explained",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One collective: where, over which axes, and of how many bytes each time."""

    place: str
    kind: str
    axes: tuple
    num_bytes: int
    source: str = dataclasses.field(default="", compare=False)
    shape: str = dataclasses.field(default="", compare=False)


def build(name):
    import importlib

    module, options = MODELS[name]
    return importlib.import_module(f"models.{module}").build(**options)


def step_of(model, mesh, exact):
    """The compiled step of a trainer, and its report."""
    import numpy as np
    import optax

    import shardkit as sk
    from shardkit import placement

    def data(step):
        shape = NUM_MICROBATCHES * ROWS, LENGTH + 1
        return {"tokens": np.zeros(shape, np.int32)}

    found, report_program = {}, placement.report_program

    def keep(program, num_devices, compiled):
        found[program] = compiled
        return report_program(program, num_devices, compiled)

    placement.report_program = keep
    options = {"mesh": sk.MeshSpec(**{"data": 1, "fsdp": 1, **mesh})}
    options |= {"consistency": "exact" if exact else "fast"}
    options |= {"num_microbatches": NUM_MICROBATCHES, "data": data}
    try:
        with sk.Trainer(**model, tx=optax.adamw(1e-3), **options) as trainer:
            report = trainer.inspect(math.prod(mesh.values()))["step"]
    finally:
        placement.report_program = report_program
    return found["step"], report


def place_of(op, note, exact):
    """Where a collective is: in a microbatch, in the loop over passes, or once."""
    if not note:
        return "step"
    depth = op.count("while/body")
    return "pass" if exact and depth == 1 else "microbatch"


def compiled_lines(text, sizes, exact):
    from shardkit.hlo import find_exchanges, parse_module, shape_bytes
    from shardkit.hlo.groups import span_of

    found = []
    for each in find_exchanges(parse_module(text)):
        op, shape = each.instruction.op_name, each.end.shape
        axes = span_of(each.instruction.attributes, sizes).axes
        place = place_of(op, each.note, exact)
        shapes = [(shape, each.num_bytes)]
        if each.kind == "all-reduce":
            # Several that travel together are one each.
            parts = re.findall(r"\w+\[[\d,]*\]", shape)
            shapes = [(part, shape_bytes(part)) for part in parts]
        for part, num_bytes in shapes:
            line = Line(place, each.kind, axes, num_bytes, op, part)
            found += [line] * each.count
    return found


def predicted_lines(facts, meshes, sizes, exact):
    """Those of a microbatch one by one; those of a step as far as sums tell."""
    from shardkit.planner.exchanges import microbatch_exchanges, state_exchanges

    found = []
    for item in facts.work.items:
        if num_bytes := item.bytes_on(sizes):
            line = Line("microbatch", item.kind, (item.axis,), int(num_bytes))
            line = dataclasses.replace(line, source=item.source)
            found += [line] * item.times
    if exact:
        for leaf in facts.params:
            cuts = [axis for axis in leaf.cuts if axis in GROUP and sizes[axis] > 1]
            found += [Line("microbatch", "all-reduce", (a,), 4, "peaks") for a in cuts]
    peaks = [x for x in microbatch_exchanges(facts, meshes) if x.state == "peaks"]
    assert not exact or sum(x.num_bytes[0] for x in peaks) == 4 * sum(
        x.source == "peaks" for x in found
    )
    batch = tuple(axis for axis in BATCH if sizes[axis] > 1)
    for each in state_exchanges(facts, meshes, exact=exact):
        is_all = each.state in ("other grads", "metrics", "model state", "peaks")
        axes = batch if is_all else (each.axis,)
        if each.num_bytes[0] and all(sizes[axis] > 1 for axis in axes) and axes:
            place = "pass" if each.state == "peaks" else "step"
            found.append(
                Line(place, each.kind, axes, int(each.num_bytes[0]), each.state)
            )
    return found


def leftovers(predicted, compiled):
    """What of both has no match: one by one in microbatches, in sum elsewhere."""
    left, right = collections.Counter(predicted), collections.Counter(compiled)
    only = [left - right, right - left]
    for key in {(x.place, x.kind, x.axes) for x in (*left, *right)}:
        sums = [
            sum(x.num_bytes * n for x, n in side.items() if key_of(x) == key)
            for side in (left, right)
        ]
        if sums[0] == sums[1]:
            only = [
                collections.Counter({x: n for x, n in side.items() if key_of(x) != key})
                for side in only
            ]
    named = [{}, {}]
    for place, (side, lines) in enumerate(
        zip(only, (predicted, compiled), strict=True)
    ):
        for line in lines:
            if line in side:
                named[place].setdefault(line, line)
    return [
        [(named[i][line], count) for line, count in only[i].items()] for i in (0, 1)
    ]


def key_of(line):
    return line.place, line.kind, line.axes


def class_of(pair, line):
    """Why a collective has no match; `"unknown"` if nothing here explains it."""
    is_number = re.match(r"\(?(s32|u32|pred|s8|u8)\[", line.shape)
    # What routes tokens permutes, too; elsewhere it may be named as what reads it.
    if line.kind == "collective-permute" and (
        MODELS[pair.model][0] == "gpt" or re.search(r"/(slice|pad)$", line.source)
    ):
        return "seams"
    if line.place == "step" and line.kind != "all-reduce":
        return "once"
    if line.place == "step" and (is_number or line.source == "norm"):
        return "digits"
    if is_number and line.place == "microbatch":
        return "numbers"
    if MODELS[pair.model][1].get("sequence_parallel"):
        return "sides"
    if MODELS[pair.model][0] == "moe" and "expert" in pair.mesh:
        return "routing"
    return "unknown"


def classes_of(pair, left, right):
    """Sorts what has no match."""
    found = collections.defaultdict(list)
    for side, lines in (("predicted", left), ("found", right)):
        for line, count in lines:
            found[class_of(pair, line)].append((side, line, count))
    return dict(found)


def compare(number):
    import jax
    import numpy as np
    import optax

    from shardkit.mesh import MESH_AXES
    from shardkit.planner.compiled_peak import compile_microbatch
    from shardkit.planner.ledger import Habits
    from shardkit.planner.memory import memory
    from shardkit.planner.meshes import Meshes
    from shardkit.planner.reading import read_model

    pair = PAIRS[number]
    mesh, exact = pair.mesh, pair.exact
    model, sizes = build(pair.model), {axis: mesh.get(axis, 1) for axis in MESH_AXES}
    microbatch = {"tokens": jax.ShapeDtypeStruct((ROWS, LENGTH + 1), np.int32)}
    facts = read_model(
        model, microbatch, optax.adamw(1e-3), habits=Habits.of(jax.default_backend())
    )
    group = {axis: mesh[axis] for axis in GROUP if axis in mesh}
    asked = compile_microbatch(model, microbatch, facts, group)
    meshes = Meshes.of(mesh, NUM_MICROBATCHES)
    compiled, report = step_of(model, mesh, exact)
    kept = report.argument_bytes + report.output_bytes - report.reused_bytes
    total = kept + report.temp_bytes
    known = facts.with_peak(group, asked.peak_bytes)
    estimates = [
        sum(memory(x, meshes, exact=exact).values())[0] / total for x in (facts, known)
    ]
    predicted = predicted_lines(facts, meshes, sizes, exact)
    lines = compiled_lines(compiled.as_text(), sizes, exact)
    if not group:
        # There XLA keeps collectives of one device, which send nothing.
        lines = [x for x in lines if x.axes]
    left, right = leftovers(predicted, lines)
    return {
        "total": total,
        "estimates": estimates,
        "bytes": [sum(x.num_bytes for x in part) for part in (predicted, lines)],
        "asked": matches(asked, lines),
        "classes": classes_of(pair, left, right),
    }


def matches(asked, lines):
    """Whether one microbatch by itself exchanges what it does in a step."""
    found = collections.Counter()
    for line in lines:
        if (
            line.place == "microbatch"
            and "reduce_max" not in line.source.split("jvp")[0]
        ):
            found[line.kind, line.axes] += line.num_bytes
    return {
        key: (asked.exchanges.get(key, 0), found.get(key, 0))
        for key in {*found, *asked.exchanges}
        if asked.exchanges.get(key, 0) != found.get(key, 0)
    }


def mesh_text(mesh):
    return " ".join(f"{axis}={size}" for axis, size in mesh.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--cache")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    if arguments.cache:
        jax.config.update("jax_compilation_cache_dir", arguments.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    print(f"JAX {jax.__version__}, {jax.default_backend()}, {ROWS} rows of {LENGTH}")
    print(
        "| model | mesh | sums | XLA's memory | from shapes | compiled | collectives "
        "| differences |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for number in arguments.only or range(len(PAIRS)):
        pair = PAIRS[number]
        found = compare(number)
        shapes, known = found["estimates"]
        words = ", ".join(sorted(found["classes"])) or "none"
        print(
            f"| {pair.model} | {mesh_text(pair.mesh)} "
            f"| {'exact' if pair.exact else 'fast'} "
            f"| {found['total'] / 2**20:.2f} MiB | {shapes:.3f} | {known:.3f} "
            f"| {found['bytes'][0]:,} / {found['bytes'][1]:,} | {words} |",
            flush=True,
        )
        if arguments.verbose:
            for kind, lines in found["classes"].items():
                for side, x, n in lines:
                    print(
                        f"    {kind}: {side} {n} x {x.place} {x.kind} over {x.axes}"
                        f" {x.num_bytes} {x.shape} {x.source[:150]}"
                    )
            print("    asked:", found["asked"], flush=True)


if __name__ == "__main__":
    main()
