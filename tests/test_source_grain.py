"""Grain's data sets and loaders as sources, and training on one."""

import numpy as np
import pytest
from problems import consume, linear, weighted_loss

import shardkit as sk
from shardkit.errors import DataError
from shardkit.testing import assert_same_bits

grain = pytest.importorskip("grain")

NUM = 20
ROWS = [{"id": np.int32(i), "x": np.full(3, i, np.float32)} for i in range(NUM)]


class Double(grain.transforms.Map):
    def map(self, element):
        return {**element, "x": 2 * element["x"]}


class Noise(grain.transforms.RandomMap):
    def random_map(self, element, rng):
        return {**element, "noise": rng.normal(size=2).astype(np.float32)}


class Even(grain.transforms.Filter):
    def filter(self, element):
        return element["id"] % 2 == 0


def make_loader(*operations, shards=None, sampler=None, num_epochs=3, **options):
    whole = grain.sharding.NoSharding()
    sampler = sampler or grain.samplers.IndexSampler(
        NUM, shard_options=shards or whole, shuffle=True, num_epochs=num_epochs, seed=7
    )
    return grain.DataLoader(
        data_source=ROWS,
        sampler=sampler,
        operations=operations,
        shard_options=shards or whole,
        **options,
    )


def test_a_map_dataset_keeps_its_own_order_without_a_seed():
    data = grain.MapDataset.source(ROWS).seed(5).shuffle().map(Double())
    batches = sk.Examples(data.random_map(Noise()), global_batch_size=8, seed=None)
    expected = list(data.random_map(Noise()).repeat(4))
    for step in (7, 0, 4, 9):
        found = batches(step)
        for row in range(8):
            for name, leaf in expected[step * 8 + row].items():
                np.testing.assert_array_equal(found[name][row], leaf)


def test_data_sets_without_end_or_with_gaps():
    endless = grain.MapDataset.source(ROWS).repeat()
    with pytest.raises(DataError, match=r"found seed = 0. Leave out its .repeat\(\)"):
        sk.Examples(endless, global_batch_size=8)
    batches = sk.Examples(endless, global_batch_size=8, seed=None)
    assert batches(2)["id"].tolist() == [16, 17, 18, 19, 0, 1, 2, 3]
    gaps = grain.MapDataset.source(ROWS).filter(Even())
    with pytest.raises(DataError, match=r"at index \d+, found None"):
        sk.Examples(gaps, global_batch_size=8)(0)
    with pytest.raises(DataError, match="from_iterable"):
        sk.Examples(gaps.to_iter_dataset(), global_batch_size=8)


@pytest.mark.parametrize("shard", [None, 0, 1], ids=["whole", "first", "second"])
def test_a_loader_is_read_in_its_one_process_order(shard):
    operations = [Double(), Noise(), grain.transforms.Batch(4)]
    alone = [batch for batch in make_loader(*operations)]
    shards = None if shard is None else grain.sharding.ShardOptions(shard, 2)
    batches = sk.Examples(make_loader(*operations, shards=shards), global_batch_size=4)
    assert len(alone) == 15
    for step in (14, 3, 0, 8):
        found = batches(step)
        assert found.keys() == alone[step].keys()
        for name, leaf in alone[step].items():
            np.testing.assert_array_equal(found[name], leaf)
    with pytest.raises(DataError, match=r"example 60 .* ends after 60"):
        batches(15)
    assert batches.num_examples is None


def test_other_samplers():
    sampler = grain.samplers.SequentialSampler(NUM)
    batches = sk.Examples(make_loader(sampler=sampler), global_batch_size=5)
    assert batches(1)["id"].tolist() == [5, 6, 7, 8, 9]

    class Backwards:
        _shard_options = grain.sharding.ShardOptions(1, 2)

        def __getitem__(self, index):
            return grain.RecordMetadata(index=index, record_key=-index % NUM)

        def __len__(self):
            return 10**6

    sampler = Backwards()
    loader = make_loader(sampler=sampler)
    with pytest.raises(DataError, match="found one of shard 1 of 2"):
        sk.Examples(loader, global_batch_size=5)
    sampler._shard_options = grain.sharding.NoSharding()
    batches = sk.Examples(loader, global_batch_size=3)
    assert batches(0)["id"].tolist() == [0, 19, 18]


def test_operations_that_need_their_predecessors_are_refused():
    with pytest.raises(DataError, match="operation 1 is a Even"):
        sk.Examples(make_loader(Double(), Even()), global_batch_size=4)
    with pytest.raises(DataError, match="operation 0 is a Batch"):
        sk.Examples(
            make_loader(grain.transforms.Batch(2), Double()), global_batch_size=4
        )
    batch = grain.transforms.Batch(2, batch_fn=list)
    with pytest.raises(DataError, match="collate"):
        sk.Examples(make_loader(batch), global_batch_size=4)
    filtered = make_loader(Even(), grain.transforms.Batch(4))
    batches = sk.from_iterable(filtered)
    assert all(batches(step)["id"].tolist() for step in (4, 2, 0))
    del filtered._sampler
    with pytest.raises(DataError, match="other versions of Grain"):
        sk.Examples(filtered, global_batch_size=4)


def as_regression(element, rng):
    x = element["x"].repeat(2)[:5] / NUM + rng.normal(size=5)
    counts = np.float32(element["id"] % 3)
    return {"x": np.float32(x), "y": np.float32(x[:3]), "counts": counts}


def test_training_on_a_map_dataset_whose_devices_change(make):
    def data():
        source = (
            grain.MapDataset.source(ROWS).seed(3).shuffle().random_map(as_regression)
        )
        return sk.Examples(source, global_batch_size=8, seed=None)

    states = []
    for script in ({}, {2: 3, 4: 8}):
        problem = linear(loss=weighted_loss, data=data(), certify="off")
        trainer, _ = make(**{**problem, "mesh": sk.MeshSpec(data=1, fsdp=-1)})
        losses = [metrics.loss for metrics in consume(trainer, 6, script)]
        states.append((losses, trainer.state.params, trainer.state.opt_state))
    assert_same_bits(states[0][1], states[1][1])
    assert_same_bits(states[0][2], states[1][2])
    assert states[0][0] == states[1][0]
