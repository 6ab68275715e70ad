"""The order of a Grain `DataLoader`, by index.

Owns what is known of the insides of a loader: its sampler, its data source and its
operations, which it does not show in public.

Invariant: example `i` is the one that the loader yields as its `i`-th when one process
iterates over it, whatever its sharding, workers and buffers say. No iterator is made.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from shardkit.errors import DataError

__all__ = ["open_loader"]


def open_loader(loader: Any) -> Callable[[Sequence[int]], list[Any]]:
    """Makes a function that reads a loader's examples by index.

    Sharding is undone, so that the order is that of one process. A `Batch` at the end
    is left out, as the global batch takes its place.

    Args:
        loader: A `grain.DataLoader`.

    Returns:
        A function from indices to examples.

    Raises:
        DataError: If an operation makes the place of an example depend on those before
            it, or this version of Grain is not understood. The function raises it when
            an index lies behind the loader's last epoch.
    """
    try:
        sampler = _unshard(loader._sampler)
        source, operations = loader._data_source, list(loader._operations)
    except AttributeError as error:
        raise DataError(
            f"A grain.DataLoader: expected a sampler, a source and operations, found "
            f"none ({error}), as in other versions of Grain than 0.2.18. Give "
            "sk.Examples a grain.MapDataset."
        ) from error
    maps = _as_functions(operations)
    num_examples = len(sampler) if hasattr(sampler, "__len__") else sys.maxsize

    def read_one(index: int) -> Any:
        if index >= num_examples:
            raise DataError(
                f"A grain.DataLoader: example {index} was asked for, but its sampler "
                f"ends after {num_examples}. Give the sampler more num_epochs, or None "
                "to go on without end."
            )
        metadata = sampler[index]
        example = source[metadata.record_key]
        for change in maps:
            example = change(example, metadata.rng)
        return example

    return lambda indices: [read_one(int(index)) for index in indices]


def _unshard(sampler: Any) -> Any:
    """Returns a sampler with the order that it has where there is one process."""
    from grain import samplers, sharding

    whole = sharding.NoSharding()
    if type(sampler) is samplers.IndexSampler:
        return samplers.IndexSampler(
            sampler._num_records,
            shard_options=whole,
            shuffle=sampler._shuffle,
            num_epochs=sampler._num_epochs,
            seed=sampler._seed,
        )
    if type(sampler) is samplers.SequentialSampler:
        return samplers.SequentialSampler(
            sampler._num_records, shard_options=whole, seed=sampler._seed
        )
    options = getattr(sampler, "_shard_options", whole)
    if options.shard_count > 1:
        raise DataError(
            f"A grain.DataLoader with a {type(sampler).__name__}: expected a sampler "
            f"of the whole data, found one of shard {options.shard_index} of "
            f"{options.shard_count}. Make it with grain.sharding.NoSharding(): the "
            "examples of a batch are shared out later."
        )
    return sampler


def _as_functions(operations: list[Any]) -> list[Callable[[Any, Any], Any]]:
    """Returns what each operation does to one example, given a generator."""
    from grain import transforms

    if operations and isinstance(operations[-1], transforms.Batch):
        if operations[-1].batch_fn is not None:
            raise DataError(
                "A grain.DataLoader whose last operation is a Batch with a batch_fn: "
                "leave the Batch out, and give the function to sk.Examples as collate."
            )
        operations = operations[:-1]
    functions, problems = [], []
    for number, operation in enumerate(operations):
        if isinstance(operation, transforms.Map):
            functions.append(lambda x, _, run=operation.map: run(x))
        elif isinstance(operation, transforms.RandomMap):
            functions.append(operation.random_map)
        elif hasattr(operation, "np_random_map"):
            functions.append(operation.np_random_map)
        else:
            problems.append(f"operation {number} is a {type(operation).__name__}")
    if problems:
        raise DataError(
            "A grain.DataLoader: expected maps only, found that "
            + ", ".join(problems)
            + ". Where an example stands then depends on those before it: filter or "
            "split the source beforehand, or give up going to any step at once with "
            "sk.from_iterable(loader)."
        )
    return functions
