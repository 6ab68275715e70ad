"""Groups of devices that compute a microbatch together: `tensor`, `expert`, `context`.

What a group computes is what one device does, but for rounding; and while groups keep
their size, no bit depends on how many of them there are.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from models import gpt, moe
from shardkit.annotations import strip
from shardkit.gradient import LOSS_STREAM
from shardkit.keys import root_key, step_key, stream
from shardkit.mesh import MESH_AXES
from shardkit.model import call_loss
from shardkit.model_state import split_variables

pytestmark = pytest.mark.usefixtures("compile_cache")

ROWS, LENGTH, VOCAB, NUM_MICROBATCHES, SEED = 4, 8, 32, 5, 3
TINY = {
    "vocab_size": VOCAB,
    "num_layers": 1,
    "num_heads": 4,
    "embed_dim": 16,
    "mlp_dim": 24,
    "max_sequence_length": LENGTH,
}
MODELS = {
    "gpt": lambda: gpt.build(**TINY, dropout=0.1),
    "gpt, sequence": lambda: gpt.build(
        **TINY, sequence_parallel=True, scan_layers=True, remat=True
    ),
    "moe": lambda: moe.build(**TINY, dropout=0.1),
    "moe, by rows": lambda: moe.build(**TINY, capacity_per_row=True),
}


def batch_of(step):
    rng = np.random.default_rng(step)
    shape = NUM_MICROBATCHES * ROWS, LENGTH + 1
    return {"tokens": rng.integers(0, VOCAB, shape).astype(np.int32)}


def trainer_of(name, mesh, *, tx=None, **options):
    count = math.prod(mesh.values())
    return sk.Trainer(
        **MODELS[name](),
        # Of which the state, after one step, is the gradient.
        tx=tx or optax.sgd(0.1, momentum=0.9),
        data=batch_of,
        num_microbatches=NUM_MICROBATCHES,
        seed=SEED,
        mesh=sk.MeshSpec(**mesh),
        **{"devices": jax.devices()[:count], "certify": "off", **options},
    )


def compositions(most):
    """Lists all meshes of up to `most` devices with groups of more than one."""
    sizes = itertools.product(range(1, most + 1), repeat=len(MESH_AXES))
    meshes = [dict(zip(MESH_AXES, shape, strict=True)) for shape in sizes]
    return [
        {axis: n for axis, n in mesh.items() if n > 1 or axis in ("data", "fsdp")}
        for mesh in meshes
        if most % math.prod(mesh.values()) == 0
        and math.prod(list(mesh.values())[2:]) > 1
    ]


@pytest.fixture(scope="module")
def by_one_device():
    """Name → loss and gradient of step 0 by plain JAX, in a loop over microbatches."""
    known = {}

    def compute(name):
        model, root = MODELS[name](), root_key(SEED)
        params, state = split_variables(strip(model.init(stream(root, "init"))))

        @jax.jit
        def value_and_grad(microbatch, key):
            def loss(params):
                out, _ = call_loss(model.loss, params, state, microbatch, key)
                return out.loss_sum, out

            return jax.grad(loss, has_aux=True)(params)

        total = None
        for i in range(NUM_MICROBATCHES):
            rows = slice(i * ROWS, (i + 1) * ROWS)
            microbatch = {"tokens": batch_of(0)["tokens"][rows]}
            key = step_key(root, LOSS_STREAM, jnp.int32(0), i)
            part = jax.tree.map(np.float64, value_and_grad(microbatch, key))
            total = part if total is None else jax.tree.map(np.add, total, part)
        grads, out = total
        return out.loss_sum / out.weight, jax.tree.map(lambda g: g / out.weight, grads)

    def found(name):
        if name not in known:
            known[name] = compute(name)
        return known[name]

    return found


def assert_computes_the_same(name, mesh, by_one_device):
    loss, grads = by_one_device(name)
    with trainer_of(name, mesh) as trainer:
        [metrics] = trainer.run(1)
        [momentum] = [
            part.trace for part in trainer.state.opt_state if hasattr(part, "trace")
        ]
    assert float(metrics.loss) == pytest.approx(loss, rel=1e-6)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(grads))
    for got, want in zip(*map(jax.tree.leaves, (momentum, grads)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=3e-6 * scale)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("gpt", {"fsdp": 2, "tensor": 2, "context": 2}),
        pytest.param(
            "moe, by rows",
            {"data": 2, "fsdp": 2, "expert": 2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_group_computes_what_one_device_does(name, mesh, by_one_device):
    assert_computes_the_same(name, mesh, by_one_device)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", compositions(8), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_all_compositions_compute_what_one_device_does(name, mesh, by_one_device):
    assert_computes_the_same(name, mesh, by_one_device)


def losses_and_digest(trainer, steps, changes=None):
    with trainer:
        losses = [float(m.loss) for m in trainer.run(steps, sk.scripted(changes or {}))]
        return losses, trainer.state_digest()


ADAM = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))


def test_no_bit_depends_on_how_many_groups_there_are():
    alone = losses_and_digest(trainer_of("gpt", {"tensor": 2}, tx=ADAM), 3)
    # 7 devices are three groups, and one device that stays idle.
    moving = trainer_of("gpt", {"tensor": 2}, tx=ADAM, devices=jax.devices()[:7])
    assert losses_and_digest(moving, 3, {1: 2}) == alone


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "group", [{"tensor": 2}, {"context": 2}, {"expert": 2}, {"tensor": 2, "context": 2}]
)
@pytest.mark.parametrize("tx", [ADAM, optax.adafactor(1e-2), optax.contrib.muon(1e-2)])
def test_no_bit_depends_on_the_groups_of_any_optimizer(name, group, tx):
    alone = losses_and_digest(trainer_of(name, group, tx=tx), 4)
    for batch in ({"fsdp": -1}, {"data": -1, "fsdp": 1}, {"data": -1, "fsdp": 2}):
        moving = trainer_of(name, {**batch, **group}, tx=tx, devices=jax.devices())
        assert losses_and_digest(moving, 4, {1: 4, 2: 6, 3: 8}) == alone


def test_groups_share_evenly_as_all_make_as_many_passes():
    mesh = {"fsdp": 2, "tensor": 2}
    with trainer_of("gpt", mesh, speeds={0: 9.0, 1: 9.0}) as trainer:
        placement = trainer._controller.placements.on(4)
    assert placement.grid.counts.tolist() == [3, 2]


def test_tensor_cuts_pairs_of_products_with_one_sum_for_each():
    with trainer_of("gpt", {"tensor": 2}) as trainer:
        placement = trainer._controller.placements.on(2)
        placement.compile()
        text = placement.executable.as_text()
        layout = {leaf.path: leaf for leaf in trainer.layout}
    prefix = "params/layers/0"
    assert layout[f"{prefix}/mlp/up/kernel/value"].group == (("tensor", 1),)
    assert layout[f"{prefix}/mlp/down/kernel/value"].group == (("tensor", 0),)
    assert layout[f"{prefix}/attention/query/kernel/value"].group == (("tensor", 1),)
    assert layout[f"opt_state/0/trace/{prefix[7:]}/mlp/up/kernel/value"].group == (
        ("tensor", 1),
    )
    # On the way there: of attention's last product, and of the MLP's.
    sums = re.findall(r' all-reduce\(.*op_name="[^"]*/jvp\((\S*)\)/dot_general', text)
    assert sorted(sums) == ["BTHK,HKD->BTD", "BTM,MD->BTD"]
    assert not re.search(r" (all-to-all|collective-permute)(-start)?\(", text)


def test_state_is_cut_and_goes_to_checkpoints_and_back(tmp_path):
    name = "moe"
    config = sk.CheckpointConfig(directory=tmp_path, every=10)
    meshes = [{"expert": 2, "tensor": 2}, {"fsdp": 3}, {"tensor": 4, "context": 2}]
    digests = []
    for number, mesh in enumerate(meshes):
        events, heard = sk.EventLog(), []
        events.subscribe(heard.append)
        with trainer_of(name, mesh, checkpoint=config, events=events) as trainer:
            if number:
                trainer.restore()
            digests.append(trainer.state_digest())
            messages = [x.fields["message"] for x in heard if x.name == "notice"]
            told = [x for x in messages if "equal but for rounding" in x]
            # The first is the one that saves, and each of the others has other groups.
            assert len(told) == (number > 0)
            if not number:
                trainer.save()
    assert len(set(digests)) == 1
