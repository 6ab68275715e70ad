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
    assert leaf_axes(tree, rules) == [("embed", "heads"), (None,)]
    assert leaf_axes(tree, {"b": None, "*b": ("mlp",)}) == [None, (None,)]


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
    with pytest.raises(PartitionError, match=r"Lost.w: .*Missing"):
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
    [notice] = sk.annotate(init, {}, {"params/w": (None, None)}).unused
    assert "paths begin within params: 'w'" in notice


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


def test_types_say_it_in_their_parts_too():
    type_ = Annotated[Any, sk.Axes("embed")]

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Parts:
        maybe: type_ | None
        several: list[type_]
        named: dict[str, type_]

    x = np.zeros(4)
    tree = Parts(x, [x], {"a": x})
    assert leaf_axes(tree) == [("embed",)] * 3
    assert leaf_axes(Parts(None, [x], {})) == [("embed",)]


def test_a_type_that_says_two_things_is_a_conflict():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Two:
        w: Annotated[Any, sk.Axes("a"), sk.Axes("b")]

    with pytest.raises(PartitionError, match=r"says \('a',\) .* says \('b',\)"):
        leaf_axes(Two(np.zeros(3)))


def test_types_of_fields_without_names_are_refused():
    @jax.tree_util.register_pytree_node_class
    class Old:
        w: Annotated[Any, sk.Axes("a")]

        def __init__(self, w):
            self.w = w

        def tree_flatten(self):
            return (self.w,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    with pytest.raises(PartitionError, match=r"Old: .* registered without the names"):
        leaf_axes(Old(np.zeros(3)))


def test_boxes_within_variables_and_short_specs_are_read():
    x = np.zeros((4, 8))
    mesh = jax.make_mesh((8,), ("fsdp",))
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp"))
    tree = [
        nnx.Param(sk.axes(x, "embed", "mlp"), eager_sharding=False),
        nnx.Param(x, eager_sharding=False, out_sharding=PartitionSpec("embed")),
        nnx.Param(jnp.zeros((8, 4)), eager_sharding=False, out_sharding=sharding),
    ]
    assert leaf_axes(tree) == [("embed", "mlp"), ("embed", None), ("fsdp", None)]


def test_a_mesh_axis_by_name_and_by_spec_is_the_same():
    tree = {"w": sk.axes(np.zeros((4, 8)), None, "fsdp")}
    found = leaf_axes(tree, {"w": PartitionSpec(None, "fsdp")})
    assert found == [(None, "mesh:fsdp")]
    with pytest.raises(PartitionError, match="mesh:bogus"):
        sk.axes(np.zeros(3), "mesh:bogus")


def test_a_rule_can_say_that_dims_have_no_names():
    [free] = read_axes({"b": np.zeros(3)}, {"b": None})
    assert (free.names, free.said_by) == ((None,), ("path rule 'b'",))
    with pytest.raises(PartitionError, match="annotated twice"):
        leaf_axes({"b": sk.axes(np.zeros(3), "embed")}, {"b": None})


def test_rules_see_the_paths_that_a_trainer_shows_them():
    def init(key):
        return sk.Variables({"w": jnp.zeros((4, 8))}, {"w": jnp.zeros((4, 8))})

    table = sk.annotate(init, {"embed": "fsdp"}, {"w": ("embed", None)})
    assert table.dims == (0, 0)
    assert not table.unused
    assert sk.annotate(jax.tree_util.Partial(init)).unplaced == ("params/w", "state/w")
