"""Tensor-parallel axes that are found from a loss, and how they are written."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_models import (
    BATCH,
    CASES,
    EMBED,
    LENGTH,
    MLP,
    arrays,
    case,
    mlp,
    model,
    norm,
)

import shardkit as sk
from models import gpt, moe, resnet, vit
from shardkit.annotations import read_axes
from shardkit.errors import ConfigError
from shardkit.logical_axes import mesh_axis
from shardkit.model_state import split_variables
from shardkit.planner.tensor_rules import find_tensor_rules

TOKENS = {"tokens": jax.ShapeDtypeStruct((2, 17), np.int32)}
SMALL = {"num_layers": 2, "embed_dim": 32, "num_heads": 4, "mlp_dim": 64}


def cuts(found):
    return {leaf.path: leaf.dim for leaf in found.leaves if leaf.dim >= 0}


def reasons(found):
    return {leaf.path: leaf.reason for leaf in found.leaves}


@pytest.mark.parametrize("name", CASES)
def test_products_are_cut_in_pairs(name):
    _, _, expected, exchanged = CASES[name]
    found = find_tensor_rules(case(name), BATCH)
    assert cuts(found) == expected
    by_kind = {x.of: (x.count, x.num_bytes) for x in found.exchanges}
    assert by_kind == exchanged


def test_reasons_name_the_pair_and_what_closes_it():
    found = reasons(find_tensor_rules(case("biased"), BATCH))
    assert found == {
        "up": "column of pair 1: closed by down",
        "in_bias": "with pair 1: goes along with its columns",
        "down": "row of pair 1: opened by up",
        "out_bias": "whole: residual stream",
    }
    found = reasons(find_tensor_rules(case("tied"), BATCH))
    assert found["table"] == "column of pair 1: closed by sums over it"
    found = reasons(find_tensor_rules(case("summed_up"), BATCH))
    assert found["up"].endswith("dim 1: it is summed up bit by bit")
    assert (
        "cond is not followed"
        in reasons(find_tensor_rules(case("branched"), BATCH))["up"]
    )


def test_what_the_size_does_not_divide_stays_whole_and_is_told():
    found = find_tensor_rules(case("grouped"), BATCH, size=4)
    assert cuts(found) == {}
    assert "dim 1: 4 does not divide 2" in reasons(found)["k"]
    assert "4 does not divide 2" in reasons(found)["out"]
    assert cuts(find_tensor_rules(case("grouped"), BATCH, size=2))
    with pytest.raises(ConfigError, match="at least 2, found 1"):
        find_tensor_rules(case("grouped"), BATCH, size=1)


@pytest.mark.parametrize(
    "options",
    [
        {"scan_layers": True, "remat": True, "dropout": 0.1, "tie_embeddings": False},
        {"norm": "layer", "positions": "learned", "mlp": "gelu", "use_bias": True},
        {"num_kv_heads": 2},
    ],
)
def test_a_gpt_is_cut_as_megatron_cuts_it(options):
    built = gpt.build(**SMALL, **options)
    found = find_tensor_rules(built, TOKENS, size=2)
    said = read_axes(jax.eval_shape(built.init, jax.random.key(0)))
    by_hand = {
        leaf.path: dim
        for leaf in said
        for dim, name in enumerate(leaf.names)
        if gpt.AXIS_RULES.get(name) == "tensor"
    }
    assert cuts(found) == by_hand
    # Two sums a layer.
    [rows] = [x for x in found.exchanges if x.of == "row"]
    assert (rows.count, rows.num_bytes) == (4, 4 * 2 * 16 * 32 * 4)
    assert found.written.axis_rules == dict.fromkeys(
        ("heads", "kv_heads", "mlp", "vocab"), "tensor"
    )
    assert not found.written.path_rules
    assert not found.written.notes


def test_a_rule_that_there_is_may_be_taken_back():
    built = gpt.build(**SMALL, vocab_size=251)
    found = find_tensor_rules(built, TOKENS, size=2)
    assert "dim 0: 2 does not divide 251" in reasons(found)["embedding"]
    assert found.written.axis_rules["vocab"] is None
    assert annotated_by(built, found, None, built.axis_rules) == cuts(found)


def test_experts_are_cut_within_and_left_to_their_axis():
    found = find_tensor_rules(
        moe.build(num_layers=1, embed_dim=32, mlp_dim=16), TOKENS, size=2
    )
    assert cuts(found)["layers/0/experts/gate"] == 2
    assert cuts(found)["layers/0/experts/down"] == 1
    assert "layers/0/experts/router" not in cuts(found)


def test_convolutions_have_none():
    batch = {
        "image": jax.ShapeDtypeStruct((4, 64), np.float32),
        "label": jax.ShapeDtypeStruct((4,), np.int32),
    }
    found = find_tensor_rules(resnet.build(), batch)
    assert found.pairs == found.exchanges == ()
    assert all(leaf.reason.startswith("whole: ") for leaf in found.leaves)


def test_tables_that_exchange_more_than_they_hold_stay_whole():
    def apply(params, batch):
        x = params["words"][batch["label"]] + params["kinds"][batch["label"] % 2]
        return x + mlp(params, x)

    shapes = {"words": (4096, EMBED), "kinds": (2, EMBED)}
    params = arrays(**shapes, up=(EMBED, MLP), down=(MLP, EMBED))
    found = find_tensor_rules(model(params, apply), BATCH)
    assert cuts(found) == {"words": 0, "up": 1, "down": 0}
    assert "look-ups would exchange more" in reasons(found)["kinds"]


def test_what_leads_nowhere_counts_for_nothing():
    def apply(params, batch):
        h = jax.nn.relu(batch["x"] @ params["up"])
        jnp.sort(h, -1)
        return batch["x"] + h @ params["down"]

    params = arrays(up=(EMBED, MLP), down=(MLP, EMBED))
    found = find_tensor_rules(model(params, apply), BATCH)
    assert cuts(found) == {"up": 1, "down": 0}


def chain_model(widths, between):
    """A chain of products; `between` says what is done with the result of each."""
    params = arrays(
        **{f"w{i}": pair for i, pair in enumerate(itertools.pairwise(widths))}
    )

    def apply(params, batch):
        values = [batch["x"]]
        for i, what in enumerate(between):
            x = values[-1] @ params[f"w{i}"]
            if what == "norm":
                x = norm(x)
            elif what == "sort":
                x = jnp.sort(x, -1)
            elif isinstance(what, int) and widths[what] == widths[i + 1]:
                x = x + values[what]
            values.append(jnp.tanh(x))
        return values[-1]

    return model(params, apply)


def best_by_force(widths, between):
    """The most work that can be cut, and the fewest sums for it, of all choices.

    A product is whole, a column (of what is whole) or a row (of what is cut).
    """
    streams = set()
    for i, what in enumerate(between):
        if isinstance(what, int) and widths[what] == widths[i + 1]:
            streams |= {what, i + 1}
    best = (0, 0)
    for choice in itertools.product(("whole", "column", "row"), repeat=len(between)):
        cut, work, sums = False, 0, 0
        for i, (how, what) in enumerate(zip(choice, between, strict=True)):
            if (how == "row") != cut:
                break
            cut = how == "column"
            sums += how == "row"
            work += widths[i] * widths[i + 1] * (how != "whole")
            if cut and (what == "sort" or i + 1 in streams):
                break
            sums += 2 * (cut and what == "norm")
        else:
            # The loss sums up what is cut at the end, to a single number; a norm before
            # it has two for every position. Such sums have to be small.
            summed = 1 + 2 * 2 * LENGTH * (between[-1] == "norm")
            if not cut or 8 * summed <= 2 * LENGTH * widths[-1]:
                best = max(best, (work, -(sums + cut)))
    return best


@st.composite
def chains(draw):
    num = draw(st.integers(1, 6))
    widths = [
        EMBED,
        *draw(st.lists(st.sampled_from([16, 32, 48]), min_size=num, max_size=num)),
    ]
    between = [
        draw(st.sampled_from(["tanh", "tanh", "norm", "sort", *range(i + 1)]))
        for i in range(num)
    ]
    return widths, between


@settings(max_examples=40, deadline=None)
@given(chains())
def test_no_choice_cuts_more_or_sums_less(chain):
    widths, between = chain
    found = find_tensor_rules(chain_model(widths, between), BATCH)
    work = sum(np.prod(leaf.shape, dtype=int) for leaf in found.leaves if leaf.dim >= 0)
    num_sums = sum(x.count for x in found.exchanges)
    assert (work, -num_sums) == best_by_force(widths, between)


def annotated_by(model, found, path_rules, axis_rules):
    """The dims that `tensor` cuts once the rules are put before others."""
    params, _ = split_variables(jax.eval_shape(model.init, jax.random.key(0)))
    rules = {**axis_rules, **found.written.axis_rules}
    first = dict(found.written.path_rules)
    rest = {
        glob: names for glob, names in (path_rules or {}).items() if glob not in first
    }
    return {
        leaf.path: dim
        for leaf in read_axes(params, {**first, **rest})
        for dim, name in enumerate(leaf.names or ())
        if mesh_axis(name, rules) == "tensor"
    }


def test_written_rules_say_what_was_found():
    built = vit.build(num_layers=3)
    batch = {
        "image": jax.ShapeDtypeStruct((4, 64), np.float32),
        "label": jax.ShapeDtypeStruct((4,), np.int32),
    }
    found = find_tensor_rules(built, batch)
    assert annotated_by(built, found, None, built.axis_rules) == cuts(found)
    # As many for three layers as for one.
    one = find_tensor_rules(vit.build(num_layers=1), batch).written.path_rules
    assert len(found.written.path_rules) == len(one) == 8
    assert found.written.path_rules["Block_*/Dense_0/bias"] == ("tensor",)


def test_rules_over_paths_keep_what_others_said():
    path_rules = {"up": ("in", "out"), "down": (None, "in")}
    rules = {"out": "fsdp", "in": "expert"}
    found = find_tensor_rules(
        case("residual"), BATCH, axis_rules={"out": "fsdp"}, path_rules=path_rules
    )
    # What fsdp cut, it cuts along the other dim.
    assert found.written.path_rules == {
        "up": ("fsdp", "tensor"),
        "down": ("tensor", "in"),
    }
    assert annotated_by(case("residual"), found, path_rules, {}) == cuts(found)
    found = find_tensor_rules(
        case("residual"), BATCH, axis_rules=rules, path_rules={"up": (None, "in")}
    )
    assert cuts(found) == {}
    assert reasons(found)["up"].endswith("dim 1: expert cuts it")


def test_what_no_rule_can_say_is_told():
    def init(key):
        return {
            "up": sk.axes(jnp.ones((EMBED, MLP)), "wide", "wide"),
            "down": sk.axes(jnp.ones((MLP, EMBED)), "mlp", None),
        }

    apply = case("residual").loss
    found = find_tensor_rules(
        sk.Model(init=init, loss=apply), BATCH, axis_rules={"mlp": "fsdp"}
    )
    assert found.written.axis_rules == {"mlp": "tensor"}
    notes = found.written.notes
    assert notes[0].startswith("mlp goes from fsdp to tensor")
    assert "up (wide, wide) dim 1" in notes[1]


def test_globs_fit_no_path_that_is_whole():
    names = ["a/0/up", "a/1/up", "a/2/up", "b[0]/up", "b*/up"]
    shapes = dict.fromkeys(names, (EMBED, MLP)) | {"a/0/down": (MLP, EMBED)}
    shapes |= {"a/1/down": (MLP, EMBED), "b[0]/down": (MLP, EMBED)}

    def apply(params, batch):
        x = batch["x"]
        for name in ("a/0", "a/1", "b[0]"):
            x = x + jnp.tanh(x @ params[f"{name}/up"]) @ params[f"{name}/down"]
        # These two stay whole.
        for name in ("a/2", "b*"):
            x = x + jnp.sort(x @ params[f"{name}/up"], -1)[..., :EMBED]
        return x

    built = model(arrays(**shapes), apply)
    found = find_tensor_rules(built, BATCH)
    assert set(cuts(found)) == {n for n in shapes if n not in ("a/2/up", "b*/up")}
    assert annotated_by(built, found, None, {}) == cuts(found)
