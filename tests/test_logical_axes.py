import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from shardkit.annotations import axes, leaf_axes, strip
from shardkit.errors import PartitionError
from shardkit.logical_axes import check_rules, infer_shardings, sharded_dims
from shardkit.mesh import MeshSpec

RULES = {"embed": "fsdp", "mlp": "tensor", "heads": None, "layers": "fsdp"}


def dims_of(tree, rules=RULES, **options):
    arrays = jax.tree.leaves(strip(tree))
    paths = [str(i) for i in range(len(arrays))]
    shapes = [np.shape(array) for array in arrays]
    return sharded_dims(paths, shapes, leaf_axes(tree), rules, **options)


def test_strip_returns_the_very_arrays():
    w, b = np.zeros((2, 3)), np.zeros(3)
    tree = {"layer": [axes(w, "embed", "mlp"), b], "none": None}
    stripped = strip(tree)
    assert stripped["layer"][0] is w
    assert stripped["layer"][1] is b
    assert stripped["none"] is None


def test_annotations_pass_through_transformations():
    def init(key):
        return {"w": axes(jax.random.normal(key, (4, 8)), "embed", None)}

    for tree in (
        jax.eval_shape(init, jax.random.key(0)),
        jax.jit(init)(jax.random.key(0)),
    ):
        assert leaf_axes(tree) == [("embed", None)]
        assert strip(tree)["w"].shape == (4, 8)


@pytest.mark.parametrize(
    ("array", "names", "found"),
    [
        (np.zeros((4, 8)), ("embed",), r"2 dims .* \(4, 8\), found \('embed',\)"),
        (np.zeros(()), ("embed",), "0 dims"),
        (np.zeros((4,)), (), r"found \(\)"),
        (np.zeros(4), (PartitionSpec("fsdp", "data"),), "1 dims"),
        (np.zeros((4, 8)), (PartitionSpec(("data", "fsdp")),), "at most one mesh axis"),
        (np.zeros((4, 8)), (PartitionSpec(None, "fdsp"),), "found .'fdsp'."),
    ],
)
def test_axes_that_do_not_fit_are_refused(array, names, found):
    with pytest.raises(PartitionError, match=found):
        axes(array, *names)


def test_a_partition_spec_means_mesh_axes_whatever_the_rules_say():
    spec = PartitionSpec(None, "fsdp")
    tree = {"w": axes(np.zeros((4, 8, 2)), spec)}
    assert dims_of(tree, {}) == [1]
    assert dims_of(tree, {"fsdp": None}) == [1]


def test_path_rules_reach_what_carries_no_annotation():
    tree = {
        "attention": {"query": np.zeros((4, 8)), "bias": np.zeros(8)},
        "mlp": axes(np.zeros((4, 8)), "embed", None),
    }
    rules = {"*/query": ("embed", "heads"), "mlp": ("embed", None), "*": (None,)}
    assert leaf_axes(tree, rules) == [(None,), ("embed", "heads"), ("embed", None)]


parents = st.lists(st.sampled_from("ab"), max_size=4)
glob_parents = st.lists(st.sampled_from(["a", "b", "**"]), max_size=4)


def fits(parts, pattern):
    """Whether parts fit those of a pattern, where `**` is any number of parts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(fits(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return parts[:1] == pattern[:1] and fits(parts[1:], pattern[1:])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(parents=parents, globs=glob_parents)
@example(parents=[], globs=["**"])
@example(parents=["a", "b", "a"], globs=["a", "**", "b", "**", "a"])
def test_two_stars_stand_for_any_number_of_parents(parents, globs):
    tree = np.zeros(3)
    for name in reversed([*parents, "x"]):
        tree = {name: tree}
    rules = {"/".join([*globs, "x"]): ("embed",)}
    expected = ("embed",) if fits(parents, globs) else None
    assert leaf_axes(tree, rules) == [expected]


def test_path_rules_that_do_not_fit_are_all_named():
    tree = {"a": np.zeros(3), "b": np.zeros((2, 2)), "c": np.zeros((4, 5))}
    with pytest.raises(PartitionError) as caught:
        leaf_axes(tree, {"*": ("embed", "mlp", None)})
    for path, shape in (("a", "(3,)"), ("b", "(2, 2)"), ("c", "(4, 5)")):
        assert any(
            line.split()[0] == path and shape in line
            for line in str(caught.value).splitlines()[1:]
        )


def test_nnx_metadata_is_read_as_it_is():
    def param(*shape, **metadata):
        return nnx.Param(np.zeros(shape), eager_sharding=False, **metadata)

    tree = {
        "bias": param(8),
        "kernel": param(4, 8, out_sharding=("embed", "mlp")),
        "spec": param(4, 8, out_sharding=PartitionSpec("mlp", None)),
    }
    assert leaf_axes(tree) == [None, ("embed", "mlp"), ("mlp", None)]
    # They stay what they are, for the loss to use.
    assert isinstance(strip(tree)["kernel"], nnx.Param)
    assert leaf_axes(tree, {"bias": ("mlp",)})[0] == ("mlp",)
    tree["wrong"] = param(4, out_sharding=("embed", "mlp"))
    with pytest.raises(PartitionError, match="wrong"):
        leaf_axes(tree)


def test_the_first_dim_that_can_be_cut_is_cut():
    tree = [
        axes(np.zeros((4, 8)), "embed", "layers"),
        axes(np.zeros((1, 8)), "embed", "layers"),
        axes(np.zeros((8, 4)), "mlp", "embed"),
        axes(np.zeros((8, 4)), "mlp", "heads"),
        axes(np.zeros((1, 1)), "embed", "layers"),
        axes(np.zeros((0, 3)), "embed", "layers"),
        axes(np.zeros((3,)), "unknown"),
        axes(np.zeros(()), *()),
        np.zeros((8, 8)),
    ]
    assert dims_of(tree) == [0, 1, 1, -1, -1, 1, -1, -1, -1]
    assert dims_of(tree[:4], axis="tensor") == [-1, -1, 0, 0]


def test_strict_names_every_leaf_without_axes():
    tree = [axes(np.zeros(4), "embed"), np.zeros(3), np.zeros(()), np.zeros((2, 2))]
    with pytest.raises(PartitionError) as caught:
        dims_of(tree, strict=True)
    message = str(caught.value)
    assert "1  (3,)" in message
    assert "3  (2, 2)" in message
    # A scalar has nothing to name.
    assert "2  ()" not in message
    assert dims_of(tree[:1] + tree[2:3], strict=True) == [0, -1]


def test_rules_for_axes_that_do_not_exist_are_refused_with_a_suggestion():
    with pytest.raises(PartitionError) as caught:
        check_rules({"embed": "fdsp", "mlp": "tensr", "heads": None}, {"embed"})
    message = str(caught.value)
    assert "embed = 'fdsp'" in message
    assert "did you mean 'fsdp'?" in message
    assert "did you mean 'tensor'?" in message
    assert "heads" not in message


def test_rules_that_no_leaf_uses_are_warnings_and_errors_under_strict():
    rules = {"embed": "fsdp", "embd": None}
    [warning] = check_rules(rules, {"embed"})
    assert "'embd'" in warning
    assert "did you mean 'embed'?" in warning
    assert check_rules({"embed": "fsdp"}, {"embed", "mlp"}, strict=True) == []
    with pytest.raises(PartitionError, match="'embd'"):
        check_rules(rules, {"embed"}, strict=True)


names = st.sampled_from(["embed", "mlp", "heads", "layers", "unknown", None])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    dims=st.lists(st.tuples(st.integers(1, 12), names), max_size=4),
    fsdp=st.sampled_from([1, 2, 4]),
)
def test_inferred_shardings_can_always_be_used(dims, fsdp):
    array = np.arange(np.prod([size for size, _ in dims], dtype=int))
    array = array.reshape([size for size, _ in dims])
    tree = {"w": axes(array, *[name for _, name in dims])}
    mesh = MeshSpec(data=1, fsdp=-1, tensor=2).build(jax.devices()[: 2 * fsdp])
    sharding = infer_shardings(tree, RULES, mesh)["w"]
    placed = jax.device_put(array, sharding)
    np.testing.assert_array_equal(placed, array)
    spec = (*sharding.spec, *[None] * (len(dims) - len(sharding.spec)))
    for (size, name), target in zip(dims, spec, strict=True):
        assert target in (None, RULES.get(name))
        if RULES.get(name) == "tensor" and spec.count("tensor") == 0:
            assert size % 2 == 1


def test_infer_shardings_follows_the_tree():
    mesh = MeshSpec(fsdp=-1).build(jax.devices()[:4])
    tree = {"a": axes(np.zeros((8, 6)), "embed", "layers"), "b": [np.zeros(3)]}
    found = infer_shardings(tree, RULES, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(strip(tree))
    assert found["a"].spec == PartitionSpec("fsdp", None)
    assert found["b"][0].is_fully_replicated
    with pytest.raises(PartitionError, match="fdsp"):
        infer_shardings(tree, {"embed": "fdsp"}, mesh)
