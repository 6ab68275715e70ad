"""All of optax: exact on every mesh where `exactness` says so, refused where not."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from optimizers import (
    OTHERS,
    SHAPES,
    VARIANTS,
    aliases,
    build,
    exported,
    found_transformations,
    may_be_transformation,
)
from updates import (
    Problem,
    different_leaves,
    host,
    init_of,
    mesh_of,
    run_updates,
)

import shardkit as sk
from shardkit import matrices, state_layout
from shardkit.jaxprs import equations
from shardkit.state_moves import move_state

NAMES = sorted([*found_transformations(), *VARIANTS], key=str.lower)
PARAMS = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
ONE = (1, 1)
DOC = Path(__file__).parents[1] / "docs" / "optimizers.md"
BEGIN = "<!-- all of optax: made by tests/test_optimizers.py -->\n"
END = "<!-- end of optax -->\n"
# Together these have every operation that any exact update has, as a test below makes
# sure. To compile the others too takes minutes, and is done by the slow tests; so is
# every optimizer on every mesh with all leaves.
COVER = {
    (1, 8): (
        ("matrix", "scalar"),
        (
            *("contrib.galore", "contrib.madgrad", "contrib.muon, spectral"),
            *("lion", "zero_nans"),
        ),
    ),
    (1, 5): (
        ("stack", "vector"),
        ("apply_if_finite of adafactor", "MultiSteps that skips", "rmsprop"),
    ),
    (1, 2): (
        ("matrix", "vector"),
        ("contrib.mechanize", "contrib.sophia with a Hessian", "radam"),
    ),
    (2, 3): (("stack", "scalar"), ("add_noise", "flatten", "scale_by_lbfgs")),
}


@dataclasses.dataclass
class Told:
    """What `exactness` says of a transformation.

    Attributes:
        said: Just that.
        num_traces: How often an update was traced for it.
        operations: All that an update has, and what was done on whole arrays.
    """

    said: sk.Exactness
    num_traces: int
    operations: set[str]


@functools.cache
def told(name):
    traced, trace = [], state_layout._trace_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            state_layout,
            "_trace_update",
            lambda recipe, *args: traced.append((recipe, args)) or trace(recipe, *args),
        )
        said = sk.exactness(build(name), PARAMS)
    if said.refused:
        return Told(said, len(traced), set())
    recipe, (abstract, _) = traced[0]
    args = abstract, abstract.params, abstract.grad_exponent, None
    update = jax.make_jaxpr(recipe.update)(*args)
    found = {eqn.primitive.name for eqn, _ in equations(update)}
    whole = {f"whole {work.operation}" for work in said.whole}
    return Told(said, len(traced), found | whole)


@functools.cache
def problem(name, leaves=tuple(SHAPES), dtype=np.float32, seed=0):
    shapes = {leaf: SHAPES[leaf] for leaf in leaves}
    return Problem.of(build(name), init_of(shapes, dtype, seed))


def test_every_name_that_optax_exports_is_known():
    known = {name for names in aliases().values() for name in names} | OTHERS
    unknown = {
        name for name, thing in exported() if may_be_transformation(thing)
    } - known
    assert not unknown, f"say in optimizers.py what these are: {unknown}"
    assert not OTHERS - {name for name, _ in exported()}


@pytest.mark.parametrize("name", NAMES)
def test_a_transformation_is_exact_or_says_why_not(name):
    said = told(name).said
    assert said.is_exact == (not said.refused)
    if said.refused:
        assert not said.whole
        assert all(refusal.reason for refusal in said.refused)
        with pytest.raises((sk.ConfigError, sk.InexactError)) as caught:
            problem(name)
        assert said.refused[0].reason in str(caught.value)
    for work in said.whole:
        assert work.operation in str(said)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_cut_like_its_parameters_and_stays_so(name):
    said = told(name).said
    if said.refused:
        return
    # Had it not settled, there would have been one trace for each round.
    assert told(name).num_traces <= 3
    largest = {name: int(np.argmax(shape)) for name, shape in SHAPES.items() if shape}
    for leaf in jax.tree.leaves(said.state):
        for param, shape in SHAPES.items():
            if leaf.path.endswith(param) and leaf.shape == shape:
                assert leaf.dim == largest.get(param, -1), leaf


def test_factored_moments_are_cut_by_what_is_left_of_the_dims():
    said = sk.exactness(optax.adafactor(1e-2, min_dim_size_to_factor=2), PARAMS)
    # Of a matrix [6, 10] that is cut along 10, and a stack [3, 7, 2] along 7.
    cuts = {
        (match[1], leaf.shape): leaf.dim
        for leaf in jax.tree.leaves(said.state)
        if (match := re.search(r"v_(?:row|col)/(matrix|stack)$", leaf.path))
    }
    assert cuts == {
        ("matrix", (6,)): -1,
        ("matrix", (10,)): 0,
        ("stack", (7, 2)): 0,
        ("stack", (3, 2)): -1,
    }


def make_table():
    """The table of the page: what `exactness` says of every name."""
    others = {names[0]: names[1:] for names in aliases().values()}
    rows = []
    for name in NAMES:
        said = told(name).said
        called = ", ".join(f"`{x}`" for x in [name, *others.get(name, [])])
        if name in VARIANTS:
            called = name
        operations = sorted({work.operation for work in said.whole})
        reasons = dict.fromkeys(refusal.reason for refusal in said.refused)
        why = ", ".join(f"`{x}`" for x in operations) or "; ".join(reasons)
        rows.append(f"| {called} | {said.verdict} | {why} |")
    return (
        "\n".join(["| | | computed whole, or why not |", "|---|---|---|", *rows]) + "\n"
    )


def test_the_page_says_what_exactness_says():
    text = DOC.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    found = text.split(BEGIN)[1].split(END)[0]
    assert found == make_table(), f"paste:\n{make_table()}"


# The bits.


def check_bits(names, meshes, num_steps=3, **options):
    """Compares updates on meshes with those on one device; returns the last states."""
    problems = [problem(name, **options) for name in names]
    seed = options.get("seed", 0)
    expected, _ = run_updates(problems, mesh_of(*ONE), num_steps, seed)
    for mesh in meshes:
        found, states = run_updates(problems, mesh_of(*mesh), num_steps, seed)
        for step in range(num_steps):
            for i, name in enumerate(names):
                bad = different_leaves(found[step][i], expected[step][i])
                assert not bad, f"{name} after step {step} on {mesh}: {bad}"
    check_moves(names, problems, states, mesh_of(*meshes[-1]), expected[-1])


def check_moves(names, problems, states, old, expected):
    """Moves states from mesh to mesh, and looks at what arrives."""
    for name, one, state, (wanted, _) in zip(
        names, problems, states, expected, strict=True
    ):
        mesh = old
        for count in (8, 3, 1):
            new = mesh_of(1, count)
            state, mesh = move_state(state, one.layout, mesh, new).tree, new
            bad = different_leaves(host(state, one.layout), wanted)
            assert not bad, f"{name} on {count} devices: {bad}"


@pytest.mark.parametrize("mesh", COVER, ids=str)
def test_updates_have_the_same_bits_on_every_mesh(mesh, monkeypatch):
    leaves, names = COVER[mesh]
    if mesh != (1, 2):
        # Such small matrices would not be shared out.
        monkeypatch.setattr(matrices, "WORTH_SENDING", 0)
    check_bits(names, [mesh], leaves=leaves)


def test_divisors_are_hidden_from_the_compiler():
    # Hidden behind the place alone, these had other bits in eight pieces.
    check_bits(["adadelta", "centralize"], [(1, 8)], num_steps=2, seed=1)


def test_what_is_compared_has_every_operation_that_any_update_has():
    covered = set().union(
        *(told(name).operations for _, names in COVER.values() for name in names)
    )
    missing = {name: told(name).operations - covered for name in NAMES}
    assert not {name: found for name, found in missing.items() if found}


SLOW_GROUPS = [NAMES[i::10] for i in range(10)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("names", SLOW_GROUPS, ids=lambda names: names[0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_updates_have_the_same_bits_on_every_mesh(names, dtype):
    exact = [name for name in names if told(name).said.is_exact]
    if dtype == "float32":
        check_bits(exact, list(COVER), num_steps=5, seed=1)
    else:
        half = functools.partial(problem, dtype=jax.numpy.bfloat16)
        # Nor does JAX decompose matrices of bfloat16.
        exact = [name for name in exact if name != "contrib.muon, spectral"]
        usable = [name for name in exact if is_usable(half, name)]
        check_bits(usable, [(1, 5)], dtype=jax.numpy.bfloat16)


def is_usable(make, name):
    try:
        return bool(make(name))
    except sk.ConfigError:
        return False
