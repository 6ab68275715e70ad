import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import DTYPES, Recorded, layers, random_array, read, same, tree_of, views

from shardkit.checkpoint.remap import Remap
from shardkit.checkpoint.remap_ops import (
    Average,
    Cast,
    Drop,
    Fuse,
    Init,
    Pad,
    Reshape,
    Slice,
    Split,
    Stack,
    Transpose,
    Unpad,
    Unstack,
)
from shardkit.checkpoint.rules import Rule
from shardkit.errors import ConfigError, RestoreError

properties = settings(max_examples=150, deadline=None, derandomize=True)


def test_stacking_layers_and_back():
    arrays = layers(11, 3, 4)
    rule = Rule(
        "params/layers/{i}/{w}",
        "params/layers/{w}",
        Stack("i", dim=1),
        Transpose(2, 1, 0),
    )
    remap = Remap([rule])
    found = remap.apply(views(arrays))
    expected = {
        f"params/layers/{w}": np.stack(
            [arrays[f"params/layers/{i}/{w}"] for i in range(11)], 1
        ).T
        for w in "qkv"
    }
    same(read(found), expected)
    same(read(remap.inverse().apply(found)), arrays)


def test_fusing_splitting_and_pipeline_stages():
    arrays = layers(6, 2, 4)
    rule = Rule(
        [f"params/layers/{{i}}/{w}" for w in "qkv"],
        "params/stages/{stage}/qkv",
        Fuse(1),
        Stack("i"),
        Reshape(3, 2, 2, 12),
        Unstack("stage"),
    )
    remap, tree = Remap([rule]), views(arrays)
    found = remap.apply(tree)
    fused = np.stack(
        [
            np.concatenate([arrays[f"params/layers/{i}/{w}"] for w in "qkv"], 1)
            for i in range(6)
        ]
    ).reshape(3, 2, 2, 12)
    same(read(found), {f"params/stages/{n}/qkv": fused[n] for n in range(3)})
    with pytest.raises(ConfigError, match=r"rule 1 .*give inverse\(\) the source's"):
        remap.inverse()
    same(read(remap.inverse(tree).apply(found)), arrays)


def test_sources_stacked_in_their_order():
    arrays = tree_of(gate=(2, 3), up=(2, 3))
    remap = Remap([Rule(["gate", "up"], "both", Stack(dim=1))])
    found = remap.apply(views(arrays))
    same(read(found), {"both": np.stack([arrays["gate"], arrays["up"]], 1)})
    same(read(remap.inverse().apply(found)), arrays)


def test_inverses_that_depend_on_shapes_become_several_rules():
    arrays = tree_of(params__a=(2, 6), params__b=(4, 3))
    remap = Remap([Rule("params/{w}", "out/{w}", Reshape(-1))])
    inverse = remap.inverse(views(arrays))
    assert [rule.sources for rule in inverse.rules] == [("out/a",), ("out/b",)]
    same(read(inverse.apply(remap.apply(views(arrays)))), arrays)


@properties
@given(st.data())
def test_random_chains_and_their_inverses(data):
    num = data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from(DTYPES))
    arrays = {f"p/{i}": random_array(shape, dtype, i) for i in range(num)}
    goes = data.draw(st.sampled_from(["each", "one", "spread"]))
    target = {"each": "q/{i}", "one": "q", "spread": "q/{j}"}[goes]
    ops, now = elementwise(data, list(arrays.values()))
    if goes != "each":
        dim = data.draw(st.integers(0, now[0].ndim))
        ops.append(Stack("i", dim))
        now = [np.stack(now, dim)]
        more, now = elementwise(data, now)
        ops += more
    if goes == "spread":
        dim = data.draw(st.integers(0, now[0].ndim - 1))
        ops.append(Unstack("j", dim))
        now = list(np.moveaxis(now[0], dim, 0))
        more, now = elementwise(data, now)
        ops += more
    expected = {target.format(i=n, j=n): array for n, array in enumerate(now)}
    remap = Remap([Rule("p/{i}", target, *ops)])
    found = remap.apply(views(arrays))
    same(read(found), expected)
    inverse = remap.inverse(views(arrays))
    same(read(inverse.apply(found)), arrays)
    assert Remap.from_toml(remap.to_toml()) == remap
    assert Remap.from_toml(inverse.to_toml()) == inverse


def elementwise(data, now):
    """Random operations that map arrays of one shape, and what they make."""
    ops = []
    for _ in range(data.draw(st.integers(0, 3))):
        shape = now[0].shape
        if not shape:
            return ops, now
        dim = data.draw(st.integers(0, len(shape) - 1))
        match data.draw(st.sampled_from(["transpose", "reshape", "pad"])):
            case "transpose":
                dims = data.draw(st.permutations(range(len(shape))))
                ops.append(Transpose(*dims))
                now = [array.transpose(dims) for array in now]
            case "reshape":
                new = (*shape[dim::-1], -1)
                ops.append(Reshape(*new))
                now = [array.reshape(new) for array in now]
            case _:
                size = shape[dim] + data.draw(st.integers(0, 3))
                ops.append(Pad(dim, size, value=1))
                extra = [*shape[:dim], size - shape[dim], *shape[dim + 1 :]]
                fill = np.ones(extra, now[0].dtype)
                now = [np.concatenate([array, fill], dim) for array in now]
    return ops, now


def test_a_remapped_box_reads_a_box():
    recorded = {f"h/{i}/w": Recorded(np.ones((64, 64), np.float32)) for i in range(4)}
    rule = Rule("h/{i}/w", "h/w", Stack("i"), Transpose(2, 0, 1), Pad(2, 100))
    view = Remap([rule]).apply(recorded)["h/w"]
    assert view.shape == (64, 4, 100)
    assert not any(each.boxes for each in recorded.values())
    view.read(((3, 5), (1, 3), (0, 100)))
    read = {path: each.num_bytes for path, each in recorded.items()}
    assert read == {"h/0/w": 0, "h/1/w": 512, "h/2/w": 512, "h/3/w": 0}


def test_split_slice_unpad_cast_and_average():
    arrays = tree_of(qkv=(4, 9), vocab=(8, 2), r0__w=(3,), r1__w=(3,), x=(5,))
    for name in ("r0/w", "r1/w", "x"):
        arrays[name] = np.arange(len(arrays[name]), dtype=np.float32) + len(name)
    arrays["r1/w"] = arrays["r0/w"] + 1
    rules = [
        Rule("qkv", ["q", "k", "v"], Split(1, num=3)),
        Rule("vocab", "vocab", Unpad(0, 5), Slice(1, 1, 2)),
        Rule("r{r}/w", "w", Average("r", weights=[1, 3])),
        Rule("x", "x", Cast("bfloat16")),
    ]
    found = read(Remap(rules).apply(views(arrays)))
    expected = dict(zip("qkv", np.split(arrays["qkv"], 3, 1), strict=True))
    expected["vocab"] = arrays["vocab"][:5, 1:2]
    expected["w"] = arrays["r0/w"] + np.float32(0.75)
    expected["x"] = arrays["x"].astype("bfloat16")
    same(found, expected)
    with pytest.raises(ConfigError) as caught:
        Remap(rules).inverse(views(arrays))
    text = str(caught.value)
    assert "3 of 4 rules have no inverse" in text
    assert "rule 1 " not in text
    assert "float32 was rounded to bfloat16" in text


def test_a_widening_cast_has_an_inverse():
    arrays = {"x": np.arange(5).astype("bfloat16")}
    remap = Remap([Rule("x", "y", Cast("float32"))])
    found = remap.apply(views(arrays))
    assert found["y"].dtype == np.float32
    same(read(remap.inverse(views(arrays)).apply(found)), arrays)
    known = Remap([Rule("x", "y", Cast("float32", was="bfloat16"))])
    same(read(known.inverse().apply(found)), arrays)


def test_integers_that_are_averaged_have_to_be_equal():
    remap = Remap([Rule("{r}/count", "count", Average("r"))])
    arrays = {f"{r}/count": np.int32([5]) for r in range(2)}
    assert read(remap.apply(views(arrays)))["count"] == [5]
    arrays["1/count"] = np.int32([6])
    with pytest.raises(RestoreError, match="1 of 1 elements"):
        read(remap.apply(views(arrays)))


def test_init_and_drop():
    arrays = tree_of(params__old=(2,), params__embed=(4, 3))
    wanted = {
        "params/embed": np.zeros((4, 3), np.float32),
        "params/head": np.zeros((4, 3), np.float32),
        "params/new/bias": np.zeros(3, np.float32),
        "params/new/kernel": np.zeros((50, 60), "bfloat16"),
    }
    rules = [
        Rule("params/old", (), Drop()),
        Rule((), "params/head", Init(like="params/embed")),
        Rule((), "{r...}/bias", Init(value=0.5)),
        Rule((), "params/new/{w}", Init(scale=0.02, seed=3)),
    ]
    remap = Remap(rules, keep_rest=True)
    found = read(remap.apply(views(arrays), wanted))
    assert set(found) == set(wanted)
    assert (found["params/new/bias"] == 0.5).all()
    assert (found["params/head"] == arrays["params/embed"]).all()
    kernel = found["params/new/kernel"].astype(np.float32)
    assert abs(kernel.std() - 0.02) < 0.002
    table = remap.plan(views(arrays), wanted)
    assert table.is_complete
    assert table.dropped == ["params/old"]
    assert Remap.from_toml(remap.to_toml()) == remap
    with pytest.raises(ConfigError, match="rule 1 "):
        remap.inverse()


def test_everything_has_to_be_accounted_for():
    arrays = tree_of(a=(2,), b=(2, 3), c=(3,), d=(1,))
    wanted = {
        "a": np.zeros(2, np.float32),
        "b": np.zeros((3, 3), np.float32),
        "e": np.zeros(1),
    }
    rules = [
        Rule("a", "a"),
        Rule("b", "b", Transpose(1, 0)),
        Rule("c", "c", Transpose(1, 0)),
    ]
    remap = Remap(rules)
    with pytest.raises(RestoreError) as caught:
        remap.apply(views(arrays), wanted)
    text = " ".join(str(caught.value).split())
    assert "4 paths cannot be remapped" in text
    for what in (
        "d is taken by no rule",
        "e is wanted and made by no rule",
        "rule 3 for c transpose(dims=(1, 0)): expected 2 dims, found float32[3]",
        "is float32[3, 2], made by rule 2 of b; expected float32[3, 3]",
    ):
        assert what in text
    table = remap.plan(views(arrays), wanted)
    assert not table.is_complete
    assert "!" in str(table)
    allowed = Remap([Rule("a", "a")], allow=["{x}"])
    assert list(allowed.apply(views(arrays), ["a", "e"])) == ["a"]
    assert Remap(rules[:2], keep_rest=True).plan(views(arrays)).is_complete


def test_what_is_not_wanted_is_refused():
    arrays = tree_of(a=(2,), b=(2,))
    with pytest.raises(RestoreError, match="is made by keep_rest of b, and unwanted"):
        Remap([Rule("a", "a")], keep_rest=True).apply(views(arrays), ["a"])


def test_a_target_is_made_once():
    arrays = tree_of(a__w=(2,), b__w=(2,), w=(2,))
    remap = Remap([Rule("a/{x}", "{x}"), Rule("b/{x}", "{x}")], keep_rest=True)
    with pytest.raises(RestoreError) as caught:
        remap.apply(views(arrays))
    assert "w  is made by rule 1 of a/w and by rule 2 of b/w" in str(caught.value)
    assert "w  is made by rule 1 of a/w and by keep_rest of w" in str(caught.value)


def test_the_first_rule_wins():
    arrays = tree_of(a__w=(2,), b__w=(2,))
    rules = [Rule("a/w", "special"), Rule("{r...}/w", "{r...}/v")]
    assert set(Remap(rules).apply(views(arrays))) == {"special", "b/v"}


def test_numbers_have_no_gaps():
    remap = Remap([Rule("h/{i}/{w}", "h/{w}", Stack("i"))])
    arrays = tree_of(h__0__w=(2,), h__2__w=(2,), h__01__v=(2,), h__x__v=(2,))
    with pytest.raises(RestoreError) as caught:
        remap.apply(views(arrays))
    text = str(caught.value)
    assert "h/1/w   is needed by rule 1 for h/0/w" in text
    assert "h/01/v  rule 1: expected numbers, found {'i': '01'}" in text
    assert "h/x/v" in text
    huge = {f"h/{n}/w": np.zeros(1) for n in (0, 999_999_999)}
    with pytest.raises(RestoreError, match="100 paths"):
        remap.apply(views(huge))


def test_a_plan_shows_shapes_and_words():
    remap = Remap([Rule("h/{i}/w", "h/w", Stack("i"), Cast("bfloat16"))])
    table = remap.plan(views({f"h/{i}/w": np.zeros((2, 3)) for i in range(5)}))
    (row,) = table.rows
    assert (row.target, row.shape, row.dtype) == ("h/w", (5, 2, 3), "bfloat16")
    assert row.sources == tuple(f"h/{i}/w" for i in range(5))
    assert str(table) == (
        "  h/w  bfloat16[5, 2, 3]  <- h/0/w, … h/4/w (5)  "
        "stack(over=i), cast(dtype=bfloat16)"
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Rule("a/{i}", "a"), r"{i} is in the sources alone"),
        (lambda: Rule("a", "a/{i}"), r"{i} is in the targets alone"),
        (lambda: Rule("a/{i}", "a", Stack("j")), r"{j} is not in the sources alone"),
        (lambda: Rule("a", "b", Unstack("i")), r"{i} is not in the targets alone"),
        (lambda: Rule(["a", "b"], "c"), "2 arrays come out for 1 targets"),
        (lambda: Rule("a", ["b", "c"], Split(0, num=3)), "3 arrays come out for 2"),
        (lambda: Rule(["a", "b"], ["b", "c"], Split(0, num=2)), "expected one array"),
        (lambda: Rule(["a/{x}", "b"], "c/{x}", Fuse(0)), "the same names in each"),
        (lambda: Rule("a", (), Cast("int8"), Drop()), "no other operation"),
        (lambda: Rule("a", "b", Drop()), "no targets"),
        (lambda: Rule("a", "b", Init(value=0)), "no sources"),
        (lambda: Rule("a", ()), "say init or drop"),
        (lambda: Rule("a{", "b"), "a brace"),
        (lambda: Transpose(0, 2), "each dim from 0 once"),
        (lambda: Reshape(-1, -1), "one may be -1"),
        (lambda: Reshape(-2), "one may be -1"),
        (lambda: Split(0), "either sizes"),
        (lambda: Fuse(-1), "counted from 0"),
        (lambda: Cast("float33"), "the name of a dtype"),
        (lambda: Init(), "one of value, like and scale"),
        (lambda: Average(weights=[0, 0]), "not all 0"),
        (lambda: Remap([], allow=["{"]), "a brace"),
        (lambda: Rule("a/{w}", "b/{w}", "transpose"), r"checkpoint.Transpose\("),
        (lambda: Rule("opt/{p...}", None, "drop"), r"write \(\).*checkpoint.Drop\("),
        (lambda: Remap(Rule("a", "b")), r"Remap\(\[rule"),
        (lambda: Remap("layers.toml"), r"load_rules\('layers.toml'\)"),
        (lambda: Remap(["a"]), "each to be a Rule, found 'a'"),
        (lambda: Remap([], follow="ema"), r"follow=\['ema'\]"),
    ],
)
def test_rules_that_cannot_be_are_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize(
    ("shapes", "op", "says"),
    [
        ([(2, 3)], Reshape(4), "elements that fill"),
        ([(2, 3)], Reshape(-1, 4), "elements that fill"),
        ([(0, 3)], Reshape(0, -1), "elements that fill"),
        ([(2, 3)], Reshape(6, was=(3, 2)), r"the shape \[3, 2\]"),
        ([(2, 3)], Pad(0, 1), "1 at most"),
        ([(2, 3)], Unpad(1, 4), "4 or more"),
        ([(2, 3)], Slice(2, 0, 1), "a dim 2"),
        ([(2, 3)], Slice(1, 2, 1), "2 to 1"),
        ([(2, 3)], Cast("int8"), "cannot be cast"),
        ([(2, 3), (2, 4)], Stack(), r"sources like float64\[2, 3\]"),
        ([(2, 3), (3, 3)], Fuse(1), r"sources like float64\[2, 3\] but for dim 1"),
        ([(2, 3), (2, 3)], Fuse(1, sizes=(3, 4)), r"expected sizes \[3, 4\]"),
        ([(2, 3), (2, 3)], Average(weights=[1, 1, 1]), "as many sources as weights"),
        ([(2,), (2,)], Stack(dim=2), "2 dims or more"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, op, says):
    names = [f"s{n}" for n in range(len(shapes))]
    tree = views({n: np.zeros(s) for n, s in zip(names, shapes, strict=True)})
    with pytest.raises(RestoreError, match=says):
        Remap([Rule(names, "t", op)]).apply(tree)
