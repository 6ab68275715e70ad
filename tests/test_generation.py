from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardkit as sk
from models import generation, gpt
from shardkit.build import build_sampler
from shardkit.cli import parse_arguments
from shardkit.sampling import Sampling, sample_text

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.toml")

TINY = {
    "vocab_size": 17,
    "num_layers": 1,
    "num_heads": 2,
    "embed_dim": 8,
    "mlp_dim": 12,
    "max_sequence_length": 6,
}
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def built():
    model = gpt.build(**TINY)
    rng = np.random.default_rng(0)
    fill = lambda x: np.float32(rng.normal(0.2, 0.5, x.shape))  # noqa: E731
    return model, jax.tree.map(fill, jax.eval_shape(model.init, KEY))


def test_greedy_text_is_what_the_model_finds_likeliest(built):
    model, params = built
    found = model.sample(params, [3, 1], KEY, num_tokens=9, temperature=0)
    module = gpt.GPT(gpt.GPTConfig(**TINY), nnx.Rngs(0))
    logits = jax.jit(nnx.merge(nnx.graphdef(module), params))
    tokens = [3, 1]
    for _ in range(9):
        # Beyond the window it moves on; what comes later may be anything.
        window = tokens[-6:]
        rest = [9] * (6 - len(window))
        best = jnp.argmax(logits(jnp.array([window + rest]))[0, len(window) - 1])
        tokens.append(int(best))
    assert found.tolist() == tokens[2:]
    assert len(set(tokens)) > 2


def test_the_same_key_draws_the_same(built):
    model, params = built
    options = {"num_tokens": 12, "temperature": 5.0}
    first, again = (model.sample(params, [3], KEY, **options) for _ in range(2))
    other = model.sample(params, [3], jax.random.key(6), **options)
    assert first.tolist() == again.tolist() != other.tolist()
    longer = model.sample(params, [3], KEY, num_tokens=15, temperature=5.0)
    assert longer[:12].tolist() == first.tolist()


def test_top_k_draws_the_likeliest_only_in_their_proportion():
    logits = jnp.log(jnp.array([0.1, 0.5, 0.05, 0.25, 0.1]))
    keys = jax.random.split(KEY, 4000)
    drawn = jax.vmap(lambda key: generation.draw(logits, key, top_k=2))(keys)
    counts = np.bincount(drawn, minlength=5) / 4000
    np.testing.assert_allclose(counts, [0, 2 / 3, 0, 1 / 3, 0], atol=0.03)
    cold = jax.vmap(lambda key: generation.draw(logits, key, temperature=0.5))(keys)
    squares = np.array([0.1, 0.5, 0.05, 0.25, 0.1]) ** 2
    counts = np.bincount(cold, minlength=5) / 4000
    np.testing.assert_allclose(counts, squares / squares.sum(), atol=0.03)


def test_a_text_is_bytes_after_a_prompt():
    asked = []

    def sample(params, prompt, key, **options):
        asked.append((params, prompt.tolist(), key, options))
        return np.array([98, 300, 0xC3, 0xA9])

    state = SimpleNamespace(params={"w": jnp.ones(2)}, ema=None)
    sampling = Sampling(prompt="aé", num_bytes=4, temperature=0.5, top_k=3)
    assert sample_text(sample, state, sampling) == "aéb?é"
    averaged = SimpleNamespace(params=None, ema={"w": jnp.zeros(2)})
    sample_text(sample, averaged, Sampling(prompt="a", seed=1))
    (params, prompt, key, options), (average, _, other, _) = asked
    assert prompt == [97, 0xC3, 0xA9]
    assert options == {"num_tokens": 4, "temperature": 0.5, "top_k": 3}
    assert (params["w"].sum(), average["w"].sum()) == (2, 0)
    assert not (jax.random.key_data(key) == jax.random.key_data(other)).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sample-top-k", "3"], "--sample-top-k: of which text"),
        (["--sample", ""], "--sample: expected a text"),
        (["--sample", "a", "--sample-bytes", "0"], "--sample-bytes: expected at least"),
        (["--sample", "a", "--sample-temperature", "-1"], "temperature: expected a"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(sk.ConfigError, match=message):
        parse_arguments([CONFIG, *flags])


def test_a_model_that_makes_no_text_says_so():
    found = parse_arguments([CONFIG, "--sample", "a", "--sample-seed", "2"])
    assert found.sampling == Sampling(prompt="a", seed=2)
    with pytest.raises(sk.ConfigError, match=r"'models.mlp:build' has no `sample`"):
        build_sampler(found.config)


@pytest.mark.parametrize("prompt", [[], [17], [-1, 3]])
def test_a_prompt_of_no_tokens_is_refused(built, prompt):
    model, params = built
    with pytest.raises(sk.DataError, match="tokens from 0 to 16"):
        model.sample(params, prompt, KEY, num_tokens=1)


def test_ids_of_a_tokenizer_are_no_bytes():
    tiny = CONFIG.replace("digits", "tiny")
    flags = ["--data.factory", "documents", "--data.path", "a.jsonl"]
    assert build_sampler(parse_arguments([tiny, *flags]).config)
    found = parse_arguments([tiny, *flags, "--data.options.tokenizer", "t.json"])
    with pytest.raises(sk.ConfigError, match="are ids of a tokenizer"):
        build_sampler(found.config)
