"""The order of the house: who may import whom, and what importing may not do."""

import ast
import graphlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

import shardkit

ROOT = Path(__file__).parents[1]

# A module imports strictly lower tiers only, and what it imports inside a function
# counts too: put off is still needed. Hence `optim` above the `config` it reads,
# `build` above "shardkit", the package itself, whose lazy names reach all below it, and
# `command` above `build`, as it plans what configs name.
TIERS = [
    "errors events version waits hlo labels background bits blocks words",
    "tree arguments mesh keys membership model clipping places shards rounding "
    "jaxprs corpus ramp prefetch standby program_cache program_report",
    "annotations batch groups schedules mesh_choice",
    "logical_axes microbatch data layout exact_sum collectives inexact local_rules "
    "overlap noise sampling",
    "nn",
    "group_hazards",
    "digest state program model_state put senders sources matrices operations regions "
    "updates",
    "functions localize slots",
    "gradient annotation_table loss_structure frameworks",
    "cells",
    "routes shares",
    "listing totals router device_order",
    "transfer mesh_order",
    "kinds",
    "device_copies host_copies",
    "carry",
    "recipe resharding",
    "state_layout state_moves",
    "staging verdict offload",
    "device_work",
    "placement",
    "placements",
    "elastic metrics checkpoint evaluation planner probe",
    "snapshot",
    "certificate rescue chaos foresight headcount",
    "controller",
    "leaving",
    "loop",
    "trainer",
    "cluster",
    "config",
    "optim report cli testing",
    "supervised explain",
    "shardkit",
    "build",
    "command",
    "__main__",
]
TIER_OF = {name: tier for tier, names in enumerate(TIERS) for name in names.split()}
OPTIONAL = {"ray", "tensorboardX", "matplotlib", "sklearn", "zfec"}
OPTIONAL |= {"grain", "datasets", "tokenizers", "equinox", "haiku"}
MAX_LINES = 400


def parse(*patterns):
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return {path.relative_to(ROOT): ast.parse(path.read_bytes()) for path in paths}


def dotted_name(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


PACKAGE = parse("shardkit/**/*.py")
USERS = parse("models/**/*.py", "train.py")
MODULES = {dotted_name(path) for path in PACKAGE}


def iterate_imports(node, in_function=False):
    """Yields `(line, dotted name, whether inside a function)` of every import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield child.lineno, alias.name, in_function
        elif isinstance(child, ast.ImportFrom):
            source = "." * child.level + (child.module or "")
            for alias in child.names:
                yield child.lineno, f"{source}.{alias.name}", in_function
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from iterate_imports(child, in_function or is_function)


def find_imports(trees, is_bad):
    """Lists as text the imports of which `is_bad(path, name, in_function)` holds."""
    return [
        f"{path}:{line} imports {name}"
        for path, tree in trees.items()
        for line, name, in_function in iterate_imports(tree)
        if is_bad(path, name, in_function)
    ]


def resolve(name):
    """Returns the module of shardkit that an imported name is in, or "" if of none."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def top_level(module):
    """Names a module as the tier table does: packages are one entry."""
    return module.split(".")[1] if "." in module else module


def test_every_module_has_a_tier():
    missing = {top_level(module) for module in MODULES} - TIER_OF.keys()
    assert not missing, f"add {', '.join(sorted(missing))} to the tier table"


def test_imports_point_strictly_down():
    def points_up(path, name, _):
        source, target = top_level(dotted_name(path)), top_level(resolve(name))
        if source == target or not {source, target} <= TIER_OF.keys():
            return False
        return TIER_OF[target] >= TIER_OF[source]

    assert not find_imports(PACKAGE, points_up)


def test_no_cycles_inside_packages_either():
    graph = {
        dotted_name(path): {resolve(name) for _, name, _ in iterate_imports(tree)}
        for path, tree in PACKAGE.items()
    }
    # Raises CycleError, naming the cycle.
    graphlib.TopologicalSorter(graph).prepare()


def test_the_package_knows_no_models():
    users = {"models", "train", "tests", "benchmarks"}
    assert not find_imports(PACKAGE, lambda _, name, __: name.split(".")[0] in users)


def test_models_and_train_use_the_public_names_only():
    entry_points = {
        f"shardkit.{name}"
        for name in ("build", "cli", "report", "sampling", "supervised")
    }

    def is_private(path, name, _):
        allowed = entry_points if path == Path("train.py") else set()
        return name.startswith("shardkit.") and name not in allowed

    assert not find_imports(USERS, is_private)


def test_optional_packages_are_imported_inside_functions():
    def is_early(_, name, in_function):
        return name.split(".")[0] in OPTIONAL and not in_function

    assert not find_imports(PACKAGE | USERS, is_early)


def test_every_public_name_is_declared_for_type_checkers_and_is_there():
    imports = iterate_imports(PACKAGE[Path("shardkit/__init__.py")])
    declared = [name for _, name, _ in imports if name.startswith("shardkit.")]
    assert sorted(name.split(".")[-1] for name in declared) == shardkit.__all__
    assert all(hasattr(shardkit, name) for name in shardkit.__all__)


def test_every_name_of_checkpoint_is_declared_and_is_there():
    imports = iterate_imports(PACKAGE[Path("shardkit/checkpoint/__init__.py")])
    declared = [name for _, name, _ in imports if name.startswith("shardkit.")]
    names = shardkit.checkpoint.__all__
    assert sorted(name.split(".")[-1] for name in declared) == names
    found = {name: getattr(shardkit.checkpoint, name) for name in names}
    # A module inside the package would take the place of a function of its name.
    assert not [name for name, x in found.items() if isinstance(x, types.ModuleType)]


def test_no_future_annotations_and_no_relative_imports():
    def is_refused(_, name, __):
        return name == "__future__.annotations" or name.startswith(".")

    assert not find_imports(PACKAGE | USERS, is_refused)


def test_no_module_is_too_long():
    files = PACKAGE | USERS | parse("tests/**/*.py", "benchmarks/**/*.py")
    num_lines = {path: len((ROOT / path).read_bytes().splitlines()) for path in files}
    assert not {path: num for path, num in num_lines.items() if num > MAX_LINES}


@pytest.mark.parametrize(
    "module",
    [
        *("", ".checkpoint", ".cli", ".cluster.asking", ".cluster.web"),
        *(".command.main", ".config", ".data", ".membership", ".prefetch"),
        *(".report", ".snapshot.assignment", ".snapshot.cost"),
        *(".snapshot.rebuild", ".snapshot.recovery", ".snapshot.segments", ".sources"),
    ],
)
def test_importing_does_not_import_jax(module):
    program = f"import sys, shardkit{module}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)
