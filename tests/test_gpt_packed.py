"""Packed rows and weights in the GPT: as if every document were alone."""

import jax
import numpy as np
import pytest
from test_gpt import GPT2, LLAMA, TINY

import shardkit as sk
from models import gpt


@pytest.mark.parametrize(
    "options",
    [GPT2, {**LLAMA, "scan_layers": True}],
    ids=["gpt2", "llama-scan"],
)
def test_packed_documents_do_not_see_each_other(options):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 17, size=(6, 6)).astype(np.int32)
    weights = np.float32([1.0, 2.0, 0.5, 1.0, 0.0, 3.0])
    documents = sk.sources.Documents.from_arrays(tokens, weights)
    packed = sk.sources.Packed(documents, sequence_length=12)
    assert len(packed) == 3
    batch = sk.Examples(packed, global_batch_size=3)(0)
    model = gpt.build(**TINY | options | {"num_layers": 1})
    params = jax.jit(model.init)(jax.random.key(1))
    loss = jax.jit(lambda batch: model.loss(params, batch, None))
    found = loss(batch)
    # One weight a row, which counts for all of its predictions.
    alone = loss({"tokens": tokens, "weights": weights})
    np.testing.assert_allclose(found.loss_sum, alone.loss_sum, rtol=1e-5)
    assert found.weight == alone.weight == 5 * weights.sum()
    assert found.metrics["accuracy"] == alone.metrics["accuracy"]
    # And it would show: in one segment the documents see one another.
    mixed = loss({**batch, "segments": np.ones_like(batch["segments"])})
    assert abs(mixed.loss_sum - alone.loss_sum) > 1e-3
