import numpy as np
import optax
import pytest
from trees import adam, bits, layers, read, same, tree_of, views

from shardkit.checkpoint.remap import Remap
from shardkit.checkpoint.remap_ops import (
    Cast,
    Drop,
    Fuse,
    Pad,
    Reshape,
    Slice,
    Stack,
    Transpose,
    Unpad,
)
from shardkit.checkpoint.rules import Rule
from shardkit.errors import RestoreError
from shardkit.tree import named_leaves


def test_moments_and_averages_follow_their_parameters():
    arrays = layers(3, 2, 4)
    names = ["opt_state/0/mu", "opt_state/0/nu", "ema"]
    everything = arrays | adam(arrays, *names) | {"opt_state/0/count": np.int32(3)}
    rules = [
        Rule(
            [f"params/layers/{{i}}/{w}" for w in "qkv"],
            "params/layers/qkv",
            Fuse(1),
            Stack("i"),
            Transpose(0, 2, 1),
            Cast("bfloat16"),
            Pad(1, 20, value=7),
        ),
        Rule("opt_state/{n}/count", "opt_state/{n}/count"),
    ]
    remap = Remap(rules, follow=["opt_state", "ema"])
    found = read(remap.apply(views(everything)))
    assert set(found) == {
        "params/layers/qkv",
        "opt_state/0/count",
        *(f"{name}/layers/qkv" for name in names),
    }
    for name in names:
        parts = [
            [everything[f"{name}/layers/{i}/{w}"] for w in "qkv"] for i in range(3)
        ]
        expected = np.stack([np.concatenate(part, 1).T for part in parts])
        expected = np.pad(expected, ((0, 0), (0, 8), (0, 0)))
        # The cast is for parameters, and padding for moments is 0.
        assert bits(found[f"{name}/layers/qkv"]) == bits(expected)
    assert found["params/layers/qkv"].dtype.name == "bfloat16"
    assert (found["params/layers/qkv"][:, 12:] == 7).all()


def test_what_follows_takes_the_way_back():
    arrays = layers(3, 2, 4)
    everything = arrays | adam(arrays, "opt_state/0/mu")
    rules = [
        Rule("params/layers/{i}/{w}", "params/{w}", Stack("i"), Transpose(0, 2, 1))
    ]
    remap = Remap(rules, follow=["opt_state"])
    found = remap.apply(views(everything))
    assert set(found) == {
        f"{r}/{w}" for r in ("params", "opt_state/0/mu") for w in "qkv"
    }
    same(read(remap.inverse().apply(found)), everything)


def factored(arrays, row=-1, col=-2):
    """What Adafactor keeps: means of the squares over one of the widest dims."""
    made = {}
    for path, array in arrays.items():
        for name, at in (("v_row", row), ("v_col", col)):
            dim = int(np.argsort(array.shape, kind="stable")[at])
            made[path.replace("params", f"opt_state/0/{name}", 1)] = np.mean(
                np.square(array), dim, dtype=np.float64
            )
        made[path.replace("params", "opt_state/0/v", 1)] = np.zeros(1)
    return made


def ordinary(arrays):
    generator = np.random.default_rng(0)
    return {path: generator.normal(size=a.shape) for path, a in arrays.items()}


@pytest.mark.parametrize(
    ("shape", "ops"),
    [
        ((5, 8), [Transpose(1, 0)]),
        ((6, 6), [Transpose(1, 0)]),
        ((5, 8), [Stack("i")]),
        ((6, 6), [Stack("i", 2), Transpose(1, 2, 0)]),
        ((5, 8), [Stack("i", 1), Transpose(2, 1, 0)]),
        ((4, 30, 20), [Stack("i"), Reshape(12, 30, 20)]),
        ((30, 20), [Reshape(30, 1, 20), Stack("i"), Transpose(0, 3, 2, 1)]),
        ((9, 8), [Stack("i"), Slice(0, 1, 3)]),
    ],
)
def test_factored_moments_are_those_of_the_remapped_parameter(shape, ops):
    arrays = ordinary(layers(3, *shape))
    target = "params/{w}" if any(op.gathers for op in ops) else "params/{w}/{i}"
    remap = Remap([Rule("params/layers/{i}/{w}", target, *ops)], follow=["opt_state"])
    found = read(remap.apply(views(arrays | factored(arrays))))
    params = {path: a for path, a in found.items() if path.startswith("params")}
    expected = factored(params)
    assert set(found) == set(params) | set(expected)
    for path, array in expected.items():
        assert found[path].shape == array.shape, path
        np.testing.assert_allclose(found[path], array)


@pytest.mark.parametrize(
    ("shape", "ops", "says"),
    [
        ((5, 8), [Stack("i"), Reshape(3, 40)], "averaged over dim"),
        ((5, 8), [Pad(1, 9), Stack("i")], "averaged over dim 1"),
        ((5, 8), [Stack("i"), Unpad(2, 2)], "averaged over dim 2"),
        ((2, 2), [Stack("i")], "two widest dims"),
    ],
)
def test_factored_moments_that_cannot_follow_are_refused(shape, ops, says):
    arrays = ordinary(layers(3, *shape))
    rule = Rule("params/layers/{i}/{w}", "params/{w}", *ops)
    tree = views(arrays | factored(arrays))
    with pytest.raises(RestoreError, match=says) as caught:
        Remap([rule], follow=["opt_state"]).apply(tree)
    assert "drop it and initialise it anew" in str(caught.value)


def test_factored_moments_fuse_along_the_dims_that_are_there():
    arrays = ordinary(layers(2, 64, 8))
    rule = Rule([f"params/layers/{{i}}/{w}" for w in "qkv"], "params/{i}/qkv", Fuse(1))
    moments = {p: a for p, a in factored(arrays).items() if "v_row" in p}
    found = read(Remap([rule], follow=["opt_state"]).apply(views(arrays | moments)))
    expected = np.concatenate(
        [moments[f"opt_state/0/v_row/layers/1/{w}"] for w in "qkv"]
    )
    assert bits(found["opt_state/0/v_row/1/qkv"]) == bits(expected)


def test_placeholders_follow():
    arrays = layers(2, 4, 6)
    moments = {path.replace("params", "opt_state/v"): np.zeros(1) for path in arrays}
    remap = Remap(
        [Rule("params/layers/{i}/{w}", "params/{w}", Stack("i"), Transpose(2, 1, 0))],
        follow=["opt_state"],
    )
    found = remap.apply(views(arrays | moments))
    assert found["opt_state/v/q"].shape == (1,)
    same(read(remap.inverse().apply(found)), arrays | moments)
    moments["opt_state/v/layers/1/q"] = np.ones(1)
    with pytest.raises(RestoreError, match="1 of 1 elements of copy 1"):
        read(remap.apply(views(arrays | moments)))


def test_what_cannot_follow_is_refused_with_everything_else():
    arrays = layers(2, 4, 4)
    rest = adam(arrays, "opt_state/mu") | {
        "opt_state/mu/layers/0/k": np.zeros((3, 3)),
        "opt_state/mu/layers/0/v": np.zeros(4),
        "opt_state/mu/layers/1/v": np.zeros(4),
    }
    del rest["opt_state/mu/layers/1/q"]
    rule = Rule("params/layers/{i}/{w}", "params/{w}", Stack("i"))
    with pytest.raises(RestoreError) as caught:
        Remap([rule], follow=["opt_state"]).apply(views(arrays | rest))
    text = str(caught.value)
    assert "3 paths cannot be remapped" in text
    assert "opt_state/mu/layers/1/q  is needed by rule 1 for params/layers/0/q" in text
    assert "float64[3, 3] follows a parameter float32[4, 4]" in text
    assert "may lack any of the dims [0, 1]" in text


def test_rules_and_prefixes_that_match_nothing_are_named_with_what_was_meant():
    tree = views(tree_of(params__layers__w=(2,), opt_state__mu__layers__w=(2,)))

    def fails(*rules, **options):
        with pytest.raises(RestoreError) as caught:
            Remap(rules, keep_rest=True, **options).apply(tree)
        assert "keep_rest to pass" not in str(caught.value)
        return " ".join(str(caught.value).split())

    text = fails(Rule("params/layer/{p...}", "x/{p...}"), Rule("params/layers/w", "w"))
    assert "rule 1 params/layer/{p...} matches nothing" in text
    assert "did you mean 'params/layers'?" in text
    assert "'params/layers/w'" in fails(Rule("params/layers/v", "w"))
    text = fails(Rule("{p...}/w", "{p...}/v"), Rule("params/layers/w", "w"))
    assert "rule 2 rule 1 takes all that it matches" in text
    assert "did you mean 'opt_state'?" in fails(follow=["opt_sate"])
    # What the default follows need not be there, nor what is allowed to be absent.
    gone = Rule("gone/{p...}", (), Drop())
    found = Remap([gone], keep_rest=True, allow=["gone/{p...}"], follow=["ema"])
    assert [*found.apply(tree)] == [*tree]
    # A rule for the rest may find that there is none.
    rules = [Rule("params/layers/{w}", "a/{w}"), Rule("params/{p...}", "b/{p...}")]
    assert "a/w" in Remap(rules, keep_rest=True).apply(tree)


def test_what_follows_a_dropped_parameter_is_dropped():
    arrays = tree_of(params__a=(2,), ema__a=(2,))
    table = Remap([Rule("params/a", (), Drop())], follow=["ema"]).plan(views(arrays))
    assert table.dropped == ["params/a", "ema/a"]


def test_the_moments_of_optax_are_those_of_the_remapped_parameters():
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=4)
    shapes = {"square": (8, 8), "bias": (8,), "wide": (6, 12)}
    generator = np.random.default_rng(0)

    def draw():
        return {
            str(i): {k: np.float32(generator.normal(size=s)) for k, s in shapes.items()}
            for i in range(3)
        }

    def stack(tree):
        return {k: np.stack([tree[i][k].T for i in sorted(tree)]) for k in shapes}

    def train(params, gradients):
        state = tx.update(gradients, tx.init(params), params)[1]
        leaves = named_leaves({"params": params, "opt_state": state})
        return {path: np.asarray(leaf) for path, leaf in leaves}

    params, gradients = draw(), draw()
    rules = [
        Rule("params/{i}/bias", "params/bias", Stack("i")),
        Rule("params/{i}/{w}", "params/{w}", Transpose(1, 0), Stack("i")),
        Rule("opt_state/count", "opt_state/count"),
    ]
    expected = train(stack(params), stack(gradients))
    remap = Remap(rules, follow=["opt_state"])
    found = remap.apply(views(train(params, gradients)), views(expected))
    for path, array in read(found).items():
        np.testing.assert_allclose(array, expected[path], rtol=1e-5)
