import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardkit as sk
from models import gpt, moe

KEY = jax.random.key(3)
TINY = {
    "vocab_size": 11,
    "num_layers": 1,
    "num_heads": 1,
    "embed_dim": 6,
    "mlp_dim": 5,
    "max_sequence_length": 6,
    "num_experts": 3,
}


def data(step, rows=13):
    tokens = np.random.default_rng(step).integers(11, size=(rows, 7))
    return {"tokens": tokens.astype(np.int32)}


def filled(model):
    """Variables that are quick to make, with a router that prefers some experts."""
    made = jax.eval_shape(model.init, KEY)
    rng = np.random.default_rng(1)
    fill = lambda x: jnp.float32(rng.normal(0.2, 0.5, x.shape))  # noqa: E731
    return jax.tree.map(fill, made.params), {"load": jnp.array([[0.5, 0.3, 0.2]])}


FULL = {0: 8, 1: 5, 3: 2, 4: 8}


@pytest.mark.parametrize(
    "counts", [{0: 5, 2: 1}, pytest.param(FULL, marks=pytest.mark.slow)]
)
def test_any_devices_leave_the_same_bits(counts, compile_cache):
    def run(counts):
        model = moe.build(**TINY, dropout=0.2, capacity_factor=0.9)
        with sk.Trainer(
            init=lambda key: sk.Variables(*filled(model)),
            loss=model.loss,
            axis_rules=model.axis_rules,
            tx=optax.adamw(0.02),
            data=data,
            num_microbatches=13,
            certify="off",
        ) as trainer:
            steps = list(trainer.run(5, membership=sk.scripted(counts)))
            load = np.asarray(trainer.state.model_state["load"]).tolist()
            return [(m.loss, m.metrics) for m in steps], trainer.state_digest(), load

    changing = run(counts)
    assert changing == run({0: 1})
    steps, _, load = changing
    assert all(0 < metrics["dropped"] < 1 for _, metrics in steps)
    assert np.sum(load) == pytest.approx(1, rel=1e-5)


def routed_by_hand(probability, num_chosen, capacity):
    """Who gets whom, token by token: `{(token, expert): (weight, place)}`."""
    taken, places, dropped = np.zeros(probability.shape[1], int), {}, 0
    shares = np.zeros(probability.shape[1])
    for token, row in enumerate(probability):
        best = sorted(range(len(row)), key=lambda e: (-row[e], e))[:num_chosen]
        total = sum(row[e] for e in best) if num_chosen > 1 else 1.0
        for expert in best:
            shares[expert] += 1
            if taken[expert] < capacity:
                places[token, expert] = row[expert] / total, taken[expert]
            else:
                dropped += 1
            taken[expert] += 1
    return places, dropped, shares / shares.sum()


@pytest.mark.parametrize("num_chosen", [1, 2])
def test_routing_is_that_of_a_loop(num_chosen):
    rng = np.random.default_rng(num_chosen)
    # Of few values, so that many are equal.
    probability = (rng.integers(1, 4, size=(9, 3)) / 8).astype(np.float32)
    places, dropped, shares = routed_by_hand(probability, num_chosen, 4)
    routed = moe.route(probability, num_chosen=num_chosen, capacity=4)
    dispatch, combine = np.zeros((9, 3, 4)), np.zeros((9, 3, 4))
    for (token, expert), (weight, place) in places.items():
        dispatch[token, expert, place] = 1
        combine[token, expert, place] = weight
    np.testing.assert_array_equal(routed.dispatch_NEC, dispatch)
    np.testing.assert_allclose(routed.combine_NEC, combine, rtol=1e-6)
    np.testing.assert_allclose(routed.share_E, shares, rtol=1e-6)
    assert routed.num_dropped == dropped > 0


def test_experts_answer_as_a_loop_over_tokens_does():
    config = gpt.GPTConfig(num_heads=1, embed_dim=6, mlp_dim=5)
    experts = moe.Experts(config, 3, nnx.Rngs(0))
    state = nnx.state(experts)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), state)
    nnx.update(experts, state)
    x = rng.normal(size=(2, 5, 6)).astype(np.float32)
    y, probability, _ = experts(x, num_chosen=2, capacity=4)
    tokens = x.reshape(10, 6)
    gate, up, down = (
        np.asarray(w[...]) for w in (experts.gate, experts.up, experts.down)
    )
    expected = np.zeros((10, 6))
    places, dropped, _ = routed_by_hand(np.asarray(probability), 2, 4)
    assert dropped > 0
    assert experts(x, num_chosen=2)[2].num_dropped == 0
    for (token, expert), (weight, _) in places.items():
        a = tokens[token] @ gate[expert]
        hidden = a / (1 + np.exp(-a)) * (tokens[token] @ up[expert])
        expected[token] += weight * (hidden @ down[expert])
    np.testing.assert_allclose(y.reshape(10, 6), expected, rtol=1e-4, atol=1e-5)


def test_loss_balance_and_load_are_sums_over_tokens():
    model = moe.build(**TINY, balance_weight=0.5, load_decay=0.75)
    params, state = filled(model)
    loss = jax.jit(model.loss)
    out = loss(params, state, data(0, rows=4), None)
    np.testing.assert_allclose(
        out.loss_sum, out.metrics["cross_entropy"] + 0.5 * out.metrics["balance"]
    )
    # Where all have had the same, the balance is 1 whatever the router says.
    even = {"load": np.full((1, 3), 1 / 3, np.float32)}
    found = loss(params, even, data(0, rows=4), None)
    np.testing.assert_allclose(found.metrics["balance"], found.weight, rtol=1e-5)
    left = np.asarray(out.state["load"])
    assert left.sum() == pytest.approx(1, rel=1e-5)
    assert (left >= 0.75 * state["load"]).all()
    rated = jax.jit(model.eval_loss)(params, state, data(0, rows=4), None)
    np.testing.assert_allclose(rated.loss_sum, out.metrics["cross_entropy"], rtol=1e-6)


def test_the_balance_moves_routers_where_the_load_is_uneven():
    model = moe.build(**TINY)
    params, _ = filled(model)

    def balance(params, load):
        state = {"load": jnp.stack([load])}
        return model.loss(params, state, data(0), None).metrics["balance"]

    pull = jax.jit(jax.grad(balance))
    router = lambda found: found["layers"][0]["experts"]["router"][...]  # noqa: E731
    # What expert 1 loses the others gain.
    uneven = router(pull(params, jnp.array([0.0, 1.0, 0.0])))
    assert abs(uneven).max() > 0.1
    np.testing.assert_allclose(uneven.sum(1), 0, atol=1e-4)
    np.testing.assert_allclose(router(pull(params, jnp.ones(3) / 3)), 0, atol=1e-4)


def test_no_token_sees_a_later_one_even_where_room_is_short():
    config = gpt.GPTConfig(num_heads=1, embed_dim=6, mlp_dim=5, num_layers=1)
    model = moe.MoE(config, 3, nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(256, size=(1, 9))
    changed = tokens.copy()
    changed[0, 5] = (tokens[0, 5] + 1) % 256
    run = jax.jit(lambda x: model(x, None, num_chosen=2, capacity=3)[0])
    before, after = run(tokens), run(changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.array_equal(before[:, 5], after[:, 5])


def test_the_gradient_contains_no_scatter():
    model = moe.build(**TINY)
    params, state = filled(model)

    def total(params):
        return model.loss(params, state, data(0), KEY).loss_sum

    program = str(jax.make_jaxpr(jax.grad(total))(params))
    assert re.findall(r"\bscatter[\w-]*", program) == []


def test_capacity_follows_the_tokens_of_a_microbatch():
    options = {"balance_weight": 0.0, "load_decay": 0.0, "num_experts": 4}
    config = moe.MoEConfig(experts_per_token=2, capacity_factor=1.25, **options)
    assert [config.capacity(n) for n in (64, 10, 1)] == [40, 7, 1]


def test_bad_options_are_named():
    with pytest.raises(sk.ConfigError, match=r"experts_per_token: .*1 to 2, found 3"):
        moe.build(num_experts=2, experts_per_token=3)
    with pytest.raises(sk.ConfigError, match=r"num_experts: .*; load_decay"):
        moe.build(num_experts=0, load_decay=1.0)
