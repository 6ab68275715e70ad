"""What is read of a model, beside closed forms and XLA's own count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from models import gpt, moe
from shardkit.errors import ConfigError
from shardkit.planner.flow import follow
from shardkit.planner.ledger import Cut, Habits
from shardkit.planner.liveness import peak_bytes
from shardkit.planner.reading import read_model

ROWS, LENGTH, EMBED, MLP, VOCAB = 2, 64, 128, 384, 256
TOKENS = ROWS * LENGTH
STREAM = TOKENS * EMBED * 4
"""The bytes of the residual stream."""


def tokens(rows=ROWS, length=LENGTH):
    return {"tokens": jax.ShapeDtypeStruct((rows, length + 1), np.int32)}


@functools.cache
def read(num_layers=2, **options):
    model = gpt.build(num_layers=num_layers, **options)
    return read_model(model, tokens(), optax.adamw(1e-3))


def forward_flops(num_layers):
    """Products of a Llama over `TOKENS`, a multiplication and an addition being two."""
    projections = 4 * EMBED * EMBED + 3 * EMBED * MLP
    attention = 2 * LENGTH * EMBED
    return 2 * TOKENS * (num_layers * (projections + attention) + EMBED * VOCAB)


@pytest.mark.parametrize("scan", [False, True])
def test_work_is_that_of_a_closed_form(scan):
    facts = read(scan_layers=scan)
    forward = forward_flops(2)
    assert facts.forward.total_flops == forward
    # Backwards each product is two, and rows of the embedding are summed by a product.
    rows = 2 * TOKENS * VOCAB * EMBED
    assert facts.work.total_flops == 3 * forward + rows


def test_remat_computes_layers_once_more():
    facts = read(remat=True)
    layers = forward_flops(2) - forward_flops(0)
    again = facts.work.total_flops - read().work.total_flops
    # What a layer ends with is not needed again: its last product, the MLP's.
    assert again == layers - 2 * 2 * TOKENS * EMBED * MLP


def test_six_times_parameters_times_tokens_is_close():
    facts = read(num_layers=4, scan_layers=True)
    ratio = facts.work.total_flops / (6 * facts.num_params * TOKENS)
    # Attention itself, and the rows of the embedding, are what the rule leaves out.
    attention = 2 * LENGTH * EMBED * 4 / facts.num_params
    rows = VOCAB * EMBED / 3 / facts.num_params
    assert ratio == pytest.approx(1 + attention + rows, rel=0.002)


def test_work_is_what_xla_counts_but_for_elementwise_operations():
    model = gpt.build(num_layers=2)
    params = sk.annotations.strip(jax.eval_shape(model.init, jax.random.key(0)))

    def gradient(params, microbatch):
        return jax.grad(lambda p: model.loss(p, microbatch, None).loss_sum)(params)

    counted = jax.jit(gradient).lower(params, tokens()).cost_analysis()["flops"]
    facts = read()
    assert 0.9 < facts.work.total_flops / counted <= 1.0


def test_leaves_carry_the_axes_that_may_cut_them():
    facts = read(num_layers=1)
    by_path = {leaf.path: leaf for leaf in facts.params}
    assert by_path["embedding"].cuts == ("tensor", "fsdp")
    assert by_path["layers/0/mlp/down/kernel"].names == ("mlp", "embed")
    assert by_path["layers/0/attention/query/kernel"].cuts == ("fsdp", "tensor", None)
    assert facts.state_bytes("params") == 4 * facts.num_params
    # Two moments, cut as their parameters are, and a counter.
    assert facts.state_bytes("opt_state") == 8 * facts.num_params + 4
    cut = [leaf for leaf in facts.opt_state if "fsdp" in leaf.cuts]
    assert len(cut) == 2 * sum("fsdp" in leaf.cuts for leaf in facts.params)


def test_one_sum_closes_a_pair_of_products():
    one, two = read(num_layers=1), read(num_layers=2)

    def sums(facts):
        return sum(
            amount
            for (kind, axis, _), amount in facts.work.exchanges.items()
            if (kind, axis) == ("all-reduce", "tensor")
        )

    # Megatron: two sums of the stream per layer forwards, and two backwards.
    assert sums(two) - sums(one) == 4 * STREAM
    kinds = two.work.buffers({"tensor": 2})
    # Beside sums, where each device's best guess is, and what it is.
    assert kinds["all-gather", "tensor"] == 2 * TOKENS * (4 + 4)
    assert {kind for kind, axis in kinds if axis == "tensor"} == {
        "all-reduce",
        "all-gather",
    }
    divided = sum(n for (_, axes), n in two.work.flops.items() if "tensor" in axes)
    assert divided > 0.97 * two.work.total_flops


def test_a_cut_sequence_gathers_keys_and_values_in_every_layer():
    one, two = read(num_layers=1), read(num_layers=2)

    def gathered(facts):
        return sum(
            amount
            for (kind, axis, _), amount in facts.work.exchanges.items()
            if (kind, axis) == ("all-gather", "context")
        )

    assert gathered(two) - gathered(one) == 2 * STREAM
    assert two.divisors["context"] == LENGTH
    assert two.notes == ()


def test_experts_exchange_tokens():
    facts = read_model(moe.build(num_layers=1), tokens(), optax.adamw(1e-3))
    kinds = {kind for kind, axis, _ in facts.work.exchanges if axis == "expert"}
    assert {"reduce-scatter", "all-gather"} <= kinds
    # Four experts, two rows.
    assert facts.divisors["expert"] == 2
    assert facts.notes == ()
    assert facts.model_state
    # Without experts there are rows to share.
    assert read().divisors["expert"] == ROWS
    assert not any("expert" in leaf.cuts for leaf in read().params)


def in_group(name, axis, habits=None, **options):
    """Bytes of buffers of a microbatch, by kind, on two devices along an axis."""
    build = {"gpt": gpt.build, "moe": moe.build}[name]
    model = build(num_layers=1, **options)
    facts = read_model(model, tokens(), optax.sgd(0.1), habits=habits)
    buffers = facts.work.buffers({axis: 2})
    return {kind: n for (kind, over), n in buffers.items() if over == axis and n}


def test_experts_with_places_of_their_own_rows_swap_tokens():
    found = in_group("moe", "expert", capacity_per_row=True)
    # Two rows with 40 places in each of four experts; there and back, twice.
    assert found["all-to-all"] == 4 * (2 * 4 * 40 * 64 * 4) / 2
    assert "all-gather" not in found


def test_what_a_compiler_does_not_put_off_is_exchanged_more_often():
    late = in_group("gpt", "tensor")
    at_once = in_group("gpt", "tensor", Habits.of("cpu"))
    # Backwards gate and up are two sums, and query, key and value three.
    assert at_once["all-reduce"] - late["all-reduce"] == 3 * STREAM
    late = in_group("gpt", "tensor", sequence_parallel=True)
    at_once = in_group("gpt", "tensor", Habits.of("cpu"), sequence_parallel=True)
    assert late["reduce-scatter"] > 0
    assert "reduce-scatter" not in at_once


def test_positions_that_are_cut_come_together_where_rows_are_joined():
    x = jnp.ones((4, 6, 5))
    cuts = [("expert", "context", None)]
    [out], ledger = cuts_of(lambda x: x.reshape(-1, 5), (x,), cuts)
    assert out.dims == ("expert", None)
    [item] = ledger.items
    assert (item.kind, item.axis, item.axes) == ("all-gather", "context", {"expert"})
    assert item.bytes_on({"context": 3, "expert": 2}) == 4 * 6 * 5 * 4 / 2
    assert item.bytes_on({"expert": 2}) == 0
    one_row = jnp.ones((1, 6, 5))
    [out], ledger = cuts_of(lambda x: x.reshape(-1, 5), (one_row,), cuts)
    assert (out.dims, ledger.items) == (("context", None), [])


def test_what_nobody_reads_is_not_counted():
    def product(x, w):
        unread = x @ w
        return x + 0 * unread.shape[0]

    args = jnp.ones((4, 8)), jnp.ones((8, 16))
    [out], ledger = cuts_of(product, args, [(None, "tensor"), ("tensor", None)])
    assert (out.dims, ledger.total_flops, ledger.items) == ((None, "tensor"), 0, [])


def test_a_dim_can_be_cut_by_two_axes():
    cut = Cut((None, ("context", "tensor")))
    assert (cut.axes, cut.place("tensor")) == ({"context", "tensor"}, 1)
    assert cut.without("context") == Cut((None, "tensor"))
    assert Cut((None, "context")).cut_at(1, "tensor") == cut
    x, w = jnp.ones((4, 8, 16)), jnp.ones((16, 64))
    cuts = [(None, ("context", "tensor"), None), (None, "tensor")]
    [out], ledger = cuts_of(lambda x, w: x @ w, (x, w), cuts)
    # What is smaller is gathered: the positions of `x`, of their pieces.
    assert out.dims == (None, "context", "tensor")
    assert ledger.exchanges == {("all-gather", "tensor", frozenset({"context"})): 2048}


def test_what_all_readers_cut_is_made_in_pieces():
    def product(x, w, other):
        y = x @ w
        return jnp.tanh(y) + other, y * other

    args = jnp.ones((4, 8)), jnp.ones((8, 16)), jnp.ones((4, 16))
    _, ledger = cuts_of(
        product, args, [(None, None), (None, "tensor"), ("context", "tensor")]
    )
    assert ledger.flops == {
        ("float32", frozenset({"context", "tensor"})): 2 * 4 * 8 * 16
    }
    assert ledger.items == []


def test_a_name_that_nothing_divides_stays_whole_and_is_told():
    facts = read(num_layers=1, vocab_size=251)
    assert facts.divisors["tensor"] == 4
    [note] = facts.notes
    assert note.startswith("vocab = 251 stays whole along tensor")
    [embedding] = [leaf for leaf in facts.params if leaf.path == "embedding"]
    assert embedding.cuts == (None, "fsdp")


def two_layers(checkpointed):
    def layers(params, x):
        return (x @ params["up"]) @ params["down"]

    def init(key):
        return {
            "up": sk.axes(jnp.ones((8, 32)), "embed", "mlp"),
            "down": sk.axes(jnp.ones((32, 4)), "mlp", "embed"),
        }

    def loss(params, microbatch, key):
        apply = jax.checkpoint(layers) if checkpointed else layers
        return jnp.sum(apply(params, microbatch["x"]) ** 2)

    return sk.Model(init=init, loss=loss, axis_rules={"mlp": "tensor"})


@pytest.mark.parametrize(("checkpointed", "middle"), [(False, 32), (True, 0)])
def test_what_is_kept_is_what_the_backward_pass_reads(checkpointed, middle):
    microbatch = {"x": jax.ShapeDtypeStruct((3, 8), np.float32)}
    facts = read_model(two_layers(checkpointed), microbatch, optax.sgd(0.1))
    by_axes = {tuple(axes): n for axes, n in facts.residuals.items() if n}
    # The product in the middle, cut as the layer is, and twice the result.
    assert by_axes.get(("tensor",), 0) == 4 * 3 * middle
    assert by_axes[()] == 4 * 3 * 4
    assert facts.state_bytes("opt_state") == 0


def test_remat_of_layers_keeps_what_goes_into_them():
    kept, again = read(scan_layers=True), read(scan_layers=True, remat=True)
    one_more = read(num_layers=3, scan_layers=True, remat=True)
    assert one_more.residual_bytes - again.residual_bytes == STREAM
    assert kept.residual_bytes > 5 * again.residual_bytes
    assert kept.peak_bytes > 1.5 * again.peak_bytes


def test_masks_and_the_like_are_not_kept():
    facts = read(num_layers=1)
    scores = ROWS * 4 * LENGTH * LENGTH * 4
    # The causal mask follows from no argument.
    assert facts.residuals[frozenset()] < scores / 4


def test_more_rows_are_more_of_everything_but_parameters():
    facts = read()
    twice = facts.with_rows(2 * ROWS)
    assert twice.work.total_flops == 2 * facts.work.total_flops
    assert twice.residual_bytes == 2 * facts.residual_bytes
    assert twice.params == facts.params
    assert twice.microbatch_bytes == 2 * facts.microbatch_bytes


def test_a_model_that_no_machine_here_holds_is_read():
    model = gpt.build("llama_1b", scan_layers=True, remat=True)
    facts = read_model(model, tokens(1, 2048), optax.sgd(1e-3))
    assert facts.num_params == 1_235_814_400
    assert facts.divisors == {"tensor": 8, "expert": 1, "context": 2048}


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"x float32\[2, 3\]"):
        read_model(two_layers(False), {"x": jnp.ones((2, 3))}, optax.sgd(0.1))


def cuts_of(fn, args, cuts):
    closed = jax.make_jaxpr(fn)(*args)
    return follow(closed.jaxpr, [Cut(cut) for cut in cuts])


def test_a_gather_of_rows_adds_what_devices_hold():
    table, index = jnp.ones((16, 8)), jnp.zeros((5,), jnp.int32)
    [out], ledger = cuts_of(
        lambda t, i: t[i] * 2, (table, index), [("tensor", None), (None,)]
    )
    assert out == Cut((None, None))
    # One sum, of the rows.
    assert ledger.exchanges["all-reduce", "tensor", frozenset()] == 5 * 8 * 4


def test_a_carry_is_followed_through_a_loop():
    def loop(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    args = jnp.ones((4, 8)), jnp.ones((3, 8, 8))
    [out], ledger = cuts_of(loop, args, [(None, None), (None, None, "tensor")])
    # The product's results are cut, so that the next one adds up.
    assert out.dims == (None, None) or out.dims == (None, "tensor")
    assert ledger.total_flops == 3 * 2 * 4 * 8 * 8
    assert sum(ledger.exchanges.values()) > 0


def test_what_is_not_followed_is_made_whole_and_told():
    x = jnp.ones((4, 4))
    [out], ledger = cuts_of(jnp.linalg.cholesky, (x,), [("tensor", None)])
    assert out.axes == frozenset()
    assert any("cholesky is not followed" in note for note in ledger.notes)
    assert ledger.exchanges["all-gather", "tensor", frozenset()] > 0


def test_a_branch_counts_as_the_one_that_does_most():
    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)

    _, ledger = cuts_of(branches, (jnp.ones((4, 4)),), [(None, None)])
    assert ledger.total_flops == 2 * 4**3


def test_loops_of_unknown_length_are_told():
    def loop(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    _, ledger = cuts_of(loop, (jnp.ones((4, 4)),), [(None, None)])
    assert ledger.total_flops == 2 * 4**3
    assert ledger.notes == ["a loop of unknown length counts as one pass"]


def test_what_returns_nothing_is_passed_by():
    def printing(x, w):
        jax.debug.print("{}", x.sum())
        return (x @ w) @ w.T

    args = jnp.ones((4, 8)), jnp.ones((8, 16))
    [out], ledger = cuts_of(printing, args, [(None, None), (None, "tensor")])
    assert (out.dims, ledger.total_flops) == ((None, None), 2 * 2 * 4 * 8 * 16)


def test_a_convolution_is_counted():
    images, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 16))

    def apply(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    cuts = [(None,) * 4, (None, None, None, "tensor")]
    [out], ledger = cuts_of(apply, (images, kernel), cuts)
    assert ledger.total_flops == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)
    assert out.dims == (None, None, None, "tensor")


def test_the_peak_of_a_chain_is_two_of_its_values():
    x, w = jnp.ones((32, 64)), jnp.ones((64, 64))

    def chain(x, w):
        for _ in range(5):
            x = jnp.tanh(x @ w)
        return x

    assert peak_bytes(jax.make_jaxpr(chain)(x, w)) == 2 * x.nbytes
