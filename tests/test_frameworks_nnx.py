"""Flax NNX modules, as their users write them."""

import frameworks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardkit as sk

WIDTH = frameworks.WIDTH


class Calls(nnx.Variable):
    """A counter: a type of the user's own."""


class Peak(nnx.Variable):
    pass


class Net(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(
            WIDTH, momentum=0.9, use_bias=False, use_scale=False, rngs=rngs
        )
        kernel_init = nnx.with_partitioning(
            nnx.initializers.lecun_normal(), ("embed", "mlp")
        )
        self.linear = nnx.Linear(
            WIDTH, WIDTH, use_bias=False, kernel_init=kernel_init, rngs=rngs
        )
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.tied = self.linear
        self.calls = Calls(jnp.int32(0))
        self.peak = Peak(jnp.zeros(WIDTH), out_sharding=("mlp",))
        self.table = nnx.Variable(jnp.arange(WIDTH))

    def __call__(self, x):
        x = jnp.tanh(self.linear(self.norm(x)))
        self.calls[...] += 1
        self.peak[...] = jnp.maximum(self.peak[...], x.max(0))
        return self.tied(self.dropout(x))


def loss(module, microbatch):
    return ((module(microbatch["x"]) - microbatch["y"]) ** 2).mean()


def build(make=Net, loss=loss, **options):
    rules = {"combine": {"calls": "sum"}, "axis_rules": {"mlp": "fsdp"}}
    return sk.from_nnx(make, loss, **rules | options)


@pytest.fixture(scope="module")
def single():
    return frameworks.run(build(), {0: 1})


def test_any_devices_leave_the_same_bits(single):
    assert frameworks.run(build(), frameworks.CHANGES)[0] == single[0]


def test_axes_are_read_from_metadata():
    dims = frameworks.cut_dims(build(), {"mlp": "fsdp"})
    assert dims.params == {"linear": {"kernel": (None, "fsdp")}}
    assert dims.state["peak"] == ("fsdp",)


def test_every_variable_is_carried_on(single):
    _, state = single
    assert set(state) == {"norm", "calls", "peak", "table"}
    mean, var = frameworks.batch_statistics(0.9)
    np.testing.assert_allclose(state["norm"]["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["norm"]["var"], var, rtol=1e-5)
    assert state["calls"] == frameworks.STEPS * frameworks.GRID
    assert (state["peak"] > 0).all()
    np.testing.assert_array_equal(state["table"], np.arange(WIDTH))


def test_masks_are_those_of_the_microbatch():
    model = build()
    losses = frameworks.losses_of(model)
    assert len(set(losses.values())) == 4
    assert losses == frameworks.losses_of(build())


def test_streams_draw_masks_of_their_own():
    class Two(Net):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.other = nnx.Dropout(0.2, rngs=rngs)

    seen = []

    def recording(module, microbatch):
        ones = jnp.ones((4, 64))
        seen[:] = module.dropout(ones), module.other(ones)
        return loss(module, microbatch)

    model = build(Two, recording)
    first = frameworks.made(model)
    model.loss(first.params, first.state, frameworks.data(0), jax.random.key(1))
    assert not np.array_equal(*seen)


def test_evaluation_draws_nothing_and_takes_running_statistics():
    model = build()
    first = frameworks.made(model)
    evaluate = jax.jit(model.eval_loss)
    args = first.params, first.state, frameworks.data(0)
    outs = [evaluate(*args, jax.random.key(n)) for n in (0, 1)]
    assert outs[0].loss_sum == outs[1].loss_sum
    assert outs[0].state["calls"] == 0
    moved = {**first.state, "norm": {"mean": jnp.ones(WIDTH), "var": jnp.ones(WIDTH)}}
    other = evaluate(first.params, moved, frameworks.data(0), jax.random.key(0))
    assert other.loss_sum != outs[0].loss_sum


def test_streams_that_a_module_keeps_are_fed_too():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs
            self.noise = nnx.Rngs(noise=0)
            self.out = nnx.Linear(WIDTH, 1, rngs=rngs)

        def __call__(self, x):
            x += self.rngs.normal(x.shape) + self.noise.noise.uniform(x.shape)
            return self.out(x)

    assert len(set(frameworks.losses_of(build(Noisy, combine={})).values())) == 4


def test_only_what_is_asked_for_is_trained():
    model = build(wrt=nnx.All(nnx.Param, nnx.PathContains("linear")))
    first = model.init(jax.random.key(0))
    assert set(first.params) == {"linear"}


def message_of(**options):
    with pytest.raises(sk.PartitionError) as caught:
        frameworks.trainer(build(**options))
    return str(caught.value)


def test_what_cannot_be_combined_is_named():
    class Flags(Net):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.warm = nnx.Variable(jnp.array(False))
            self.key = nnx.Variable(rngs.params())

    def changing(module, microbatch):
        module.warm[...] = module.calls[...] > 3
        module.key[...] = jax.random.split(module.key[...])[0]
        return loss(module, microbatch)

    message = message_of(make=Flags, loss=changing, combine={})
    rows = [line.split()[:2] for line in message.splitlines()]
    assert ["calls", "int32[]"] in rows
    assert ["warm", "bool[]"] in rows
    assert ["key", "key<fry>[]"] in rows
    assert "combine=" in message


def test_variables_that_come_and_go_are_named():
    def sowing(module, microbatch):
        module.more = nnx.Intermediate(jnp.ones(2))
        del module.table
        return loss(module, microbatch)

    rows = [line.split() for line in message_of(loss=sowing).splitlines()]
    assert ["more", "Intermediate", "is", "new"] in rows
    assert ["table", "Variable", "is", "gone"] in rows


def test_params_that_a_loss_changes_are_named():
    def clipping(module, microbatch):
        module.linear.kernel[...] = module.linear.kernel[...].clip(-1, 1)
        return loss(module, microbatch)

    assert "linear/kernel" in message_of(loss=clipping)


def test_what_transformed_functions_hand_on_is_not_taken_for_changed():
    class Deep(Net):
        def __init__(self, rngs):
            super().__init__(rngs)
            make = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs))
            self.layers = nnx.split_rngs(splits=3)(make)(rngs)

        def __call__(self, x):
            scan = nnx.scan(
                lambda x, layer: layer(x),
                in_axes=(nnx.Carry, 0),
                out_axes=nnx.Carry,
            )
            x = nnx.jit(lambda module, x: scan(x, module.layers))(self, x)
            return nnx.remat(Net.__call__)(self, x)

    # Neither the params nor the table, an array of integers without a rule, changed.
    frameworks.trainer(build(Deep)).close()


def test_params_that_are_no_floats_are_named():
    class Bad(Net):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.steps = nnx.Param(jnp.int32(0))
            self.seed = nnx.Param(jax.random.key(0))

    message = message_of(make=Bad)
    assert "steps  int32[]" in message
    assert "seed   key<fry>[]" in message
    assert "wrt=" in message


def test_what_is_no_module_is_refused():
    with pytest.raises(sk.ConfigError, match=r"nnx.Module, found dict"):
        frameworks.trainer(build(lambda rngs: {"net": Net(rngs)}))


def test_axes_that_do_not_fit_are_named():
    class Bad(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.ones((2, 3)), out_sharding=("embed",))

    with pytest.raises(sk.PartitionError, match=r"w: expected .* float32\[2, 3\]"):
        build(Bad).init(jax.random.key(0))


def test_a_state_beside_the_module_is_refused():
    def stateful(module, microbatch):
        return sk.LossOutput(loss(module, microbatch), 1, state={"n": jnp.int32(0)})

    assert "carried on without it" in message_of(loss=stateful)


def test_what_does_not_make_a_module_of_rngs_is_refused():
    class Named(nnx.Module):
        def __init__(self, *, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)

    with pytest.raises(sk.ConfigError, match=r"lambda rngs: Named\(…, rngs=rngs\)"):
        sk.from_nnx(Named, lambda module, microbatch: 0.0)
    with pytest.raises(sk.ConfigError, match="found a Named that is made"):
        sk.from_nnx(Named(rngs=nnx.Rngs(0)), lambda module, microbatch: 0.0)
