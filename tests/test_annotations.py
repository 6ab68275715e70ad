"""Five ways to name axes, which mean one thing."""

import dataclasses
import re
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import shardkit as sk
from shardkit.annotations import leaf_axes, read_axes, strip
from shardkit.errors import PartitionError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    kernel: Annotated[Any, sk.Axes("embed", "mlp")]
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Net:
    dense: Dense
    biases: Annotated[list[Any], sk.Axes("mlp")]
    head: Annotated[Any, PartitionSpec("fsdp")]


def net():
    w = np.zeros((4, 8))
    return Net(Dense(w, np.zeros(8)), [np.zeros(8), np.zeros(8)], np.zeros((8, 2)))


WAYS = {
    "sk.axes": lambda w: sk.axes(w, "embed", "mlp"),
    "type of Dense.kernel": lambda w: Dense(w, None),
    "NNX's out_sharding": lambda w: nnx.Param(
        w, eager_sharding=False, out_sharding=("embed", "mlp")
    ),
    "Flax's Partitioned": lambda w: nn.Partitioned(w, names=("embed", "mlp")),
    "Flax's LogicallyPartitioned": lambda w: nn.LogicallyPartitioned(
        w, names=("embed", "mlp")
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_means_the_same(way):
    tree = {"layer": {"w": WAYS[way](np.zeros((4, 8)))}, "free": np.zeros(3)}
    free, leaf = read_axes(tree)
    assert free.names is None
    assert (leaf.names, leaf.said_by) == (("embed", "mlp"), (way,))
    assert jax.tree.leaves(strip(tree))[1].shape == (4, 8)


def test_path_rules_are_the_sixth_that_fills_in():
    for rules in ({"*/w": ["embed", "mlp"]}, {re.compile("w$"): ("embed", "mlp")}):
        [leaf] = read_axes({"layer": {"w": np.zeros((4, 8))}}, rules)
        assert leaf.names == ("embed", "mlp")
        assert leaf.said_by[0].startswith("path rule ")


def test_a_regex_is_searched_for_and_the_first_rule_counts():
    tree = {"a": {"wq": np.zeros((2, 2))}, "b": np.zeros(2)}
    rules = {re.compile("a/(wq|wk)"): ("embed", "heads"), "*": None}
    assert leaf_axes(tree, rules) == [("embed", "heads"), None]
    assert leaf_axes(tree, {"b": None, "*b": ("mlp",)}) == [None, None]


def test_types_of_fields_reach_what_is_in_them():
    assert leaf_axes(net()) == [
        ("embed", "mlp"),
        None,
        ("mlp",),
        ("mlp",),
        ("mesh:fsdp", None),
    ]


def test_all_ways_mix_in_one_tree():
    w = np.zeros((4, 8))
    tree = {way: make(w) for way, make in WAYS.items()} | {"rule": w}
    assert set(leaf_axes(tree, {"rule": ("embed", "mlp")})) == {("embed", "mlp")}


def test_order_and_paths_are_those_of_the_stripped_tree():
    w = np.zeros((4, 8))
    tree = [
        net(),
        None,
        {"b": sk.axes(w, "b", None), "a": (w, nn.Partitioned(w, (None, "c")))},
    ]
    found = read_axes(tree)
    leaves = jax.tree_util.tree_flatten_with_path(strip(tree))[0]
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]
    assert [leaf.path for leaf in found] == paths
    assert [leaf.shape for leaf in found] == [x.shape for _, x in leaves]


def test_two_that_say_the_same_are_no_conflict():
    tree = Dense(sk.axes(np.zeros((4, 8)), "embed", "mlp"), np.zeros(8))
    [kernel, _] = read_axes(tree, {"kernel": ("embed", "mlp")})
    assert kernel.names == ("embed", "mlp")
    assert len(kernel.said_by) == 3


def test_two_that_do_not_are_shown_with_all_others():
    tree = {
        "typed": Dense(sk.axes(np.zeros((4, 8)), "embed", "heads"), np.zeros(8)),
        "box": nn.Partitioned(np.zeros(4), names=("embed",)),
        "fine": sk.axes(np.zeros(4), "embed"),
    }
    with pytest.raises(PartitionError) as caught:
        leaf_axes(tree, {"box": ("mlp",)})
    text = str(caught.value)
    for part in (
        "typed/kernel",
        "type of Dense.kernel says ('embed', 'mlp')",
        "sk.axes says ('embed', 'heads')",
        "Flax's Partitioned says ('embed',)",
        "path rule 'box' says ('mlp',)",
    ):
        assert part in text
    assert "fine" not in text


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("embed", "one name for each of the 2 dims"),
        (("embed",), "one name for each of the 2 dims"),
        (("embed", "mlp", None), "one name for each of the 2 dims"),
        ((("embed", "mlp"), None), "a name or None .* found .'embed', 'mlp'."),
        ((0, 1), "a name or None .* found 0"),
        (PartitionSpec(None, None, "fsdp"), "at most 2 dims .* found 3"),
        (PartitionSpec("fsdp", "fsdp"), "each mesh axis once"),
        (PartitionSpec(("data", "fsdp")), "at most one mesh axis for each dim"),
        (PartitionSpec("fdsp"), "found .'fdsp'."),
    ],
)
def test_what_does_not_fit_names_the_array_and_who_said_it(said, found):
    with pytest.raises(PartitionError, match=found) as caught:
        leaf_axes({"a": {"w": np.zeros((4, 8))}}, {"*": said})
    assert "a/w" in str(caught.value)
    assert "path rule '*'" in str(caught.value)


def test_types_that_cannot_be_evaluated_are_refused_only_if_they_name_axes():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Unknown:
        w: "Missing"  # noqa: F821

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Lost:
        w: 'Annotated[Missing, sk.Axes("embed")]'  # noqa: F821

    assert leaf_axes(Unknown(np.zeros(3))) == [None]
    with pytest.raises(PartitionError, match=r"Lost: .*Missing"):
        leaf_axes(Lost(np.zeros(3)))


def test_linen_parameters_are_read_and_unboxed():
    kernel = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
    module = nn.Dense(8, kernel_init=kernel)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, 4)))
    assert leaf_axes(params) == [None, ("embed", "mlp")]
    made = module.init(jax.random.key(0), jnp.zeros((2, 4)))
    assert module.apply(strip(made), jnp.ones((2, 4))).shape == (2, 8)


def test_annotate_says_what_everyone_said_and_what_nobody_did():
    table = sk.annotate(net(), {"embed": "fsdp", "mpl": "tensor"}, {"nothing": None})
    text = str(table)
    assert table.unplaced == ("dense/bias",)
    assert table.dims == (0, -1, -1, -1, 0)
    assert "type of Net.biases" in text
    assert "embed→fsdp mlp" in text
    assert "1 of 5 arrays" in text
    assert "did you mean 'mlp'?" in text
    assert "no array's path fits 'nothing'" in text


def test_annotate_takes_a_model_and_its_rules_and_computes_nothing():
    def init(key):
        params = {"w": sk.axes(jax.random.normal(key, (10**6, 10**6)), "embed", None)}
        return sk.Variables(params, {"mean": jnp.zeros(3)})

    model = sk.Model(init=init, loss=lambda *_: 0.0, axis_rules={"embed": "fsdp"})
    table = sk.annotate(model)
    assert [leaf.path for leaf in table.leaves] == ["params/w", "state/mean"]
    assert table.dims == (0, -1)
    assert sk.annotate(init).dims == (-1, -1)


def test_constrain_cuts_along_the_axes_left_to_the_compiler():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    rules = {"batch": "data", "embed": "fsdp"}

    @jax.jit
    def run(x):
        # What a mesh axis does not divide stays whole.
        odd = sk.constrain(x[:, :3], None, "embed", axis_rules=rules)
        return sk.constrain(x * 2, "batch", "embed", axis_rules=rules), odd

    with jax.set_mesh(mesh):
        found, odd = run(jnp.ones((8, 6)))
    assert found.sharding.shard_shape(found.shape) == (2, 3)
    assert odd.shape == (8, 3)
    # Without a mesh there is nothing to do.
    assert run(jnp.ones((8, 6)))[0].shape == (8, 6)


def test_constrain_checks_names_and_rules():
    with pytest.raises(PartitionError, match="2 dims"):
        sk.constrain(np.zeros((2, 2)), "batch")
    with pytest.raises(PartitionError, match="did you mean 'data'"):
        sk.constrain(np.zeros(2), "batch", axis_rules={"batch": "dtaa"})
