"""The optimizer's state in host memory: the same bits, and where it lies."""

import jax
import pytest
from problems import OPTIMIZERS

import shardkit as sk
from shardkit.offload import AWAY, HERE, check_memory


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


def run(make, script=(), **options):
    trainer, _ = make(tx=OPTIMIZERS["adamw"](), certify="always", **options)
    losses = [m.loss_bits for m in trainer.run(6, sk.scripted(dict(script)))]
    return trainer, losses, trainer.state_digest()


@pytest.mark.parametrize(
    "mesh", [{}, pytest.param({"data": -1, "fsdp": 2}, marks=pytest.mark.slow)]
)
def test_it_changes_no_bit_through_changes_and_saves(make, mesh, tmp_path):
    _, *expected = run(make)
    config = sk.CheckpointConfig(directory=tmp_path, every=2)
    trainer, *found = run(
        make,
        {1: 8, 3: 5, 4: 2},
        offload=True,
        mesh=sk.MeshSpec(**mesh),
        checkpoint=config,
        snapshot=sk.SnapshotConfig(every=1),
    )
    assert found == expected
    _, state = trainer._controller.live
    assert kinds(state.opt_state) == {AWAY}
    assert kinds(state.params) == {HERE}
    # Whatever looks at the state has it on the devices, from where it can be saved.
    assert kinds(trainer.state.opt_state) == {HERE}
    trainer.save()
    again, _ = make(tx=OPTIMIZERS["adamw"](), checkpoint=config)
    assert again.restore() == 6
    assert again.state_digest() == found[1]


def test_devices_without_such_memory_are_refused():
    class Bare:
        def addressable_memories(self):
            return []

    with pytest.raises(sk.ConfigError, match="expected devices with pinned_host"):
        check_memory([Bare()])


def test_what_was_away_with_lost_devices_is_said_to_be_lost(make):
    trainer, _ = make(tx=OPTIMIZERS["adamw"](), offload=True)
    with pytest.raises(sk.LostStateError, match="what was away in their host"):
        list(trainer.run(4, sk.scripted({2: sk.Lost(3)})))
