"""Text from a model that predicts the next token.

Owns the loop that draws one token after another. Invariant: what is drawn depends on
parameters, prompt, key and options alone; the token at place `i` has the key of `i`.
Every token computes the whole window anew: there is no cache that could differ from
what was trained, and a window that is full moves on.

References:
    Fan et al., Hierarchical Neural Story Generation (ACL 2018): top-k sampling.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

import shardkit as sk

__all__ = ["draw", "sampler"]


def sampler(
    logits: Callable[[Any, Any], Array], vocab_size: int, window: int
) -> Callable[..., Any]:
    """Makes the `sample` of a `shardkit.Model`.

    Args:
        logits: `(params, tokens [1, window]) → [1, window, vocab]`, of which no place
            depends on a later one.
        vocab_size: How many tokens there are.
        window: How many tokens the model sees at most.

    Returns:
        A function of `(params, prompt, key, *, num_tokens, temperature, top_k)` that
        returns so many token ids after those of the prompt, a sequence of them.
    """

    @functools.partial(jax.jit, static_argnames=("num_tokens", "temperature", "top_k"))
    def run(params, tokens, length, key, *, num_tokens, temperature, top_k):
        def step(carry, index):
            tokens, length = carry
            last = logits(params, tokens[None])[0, length - 1]
            key_i = jax.random.fold_in(key, index)
            token = draw(last, key_i, temperature=temperature, top_k=top_k)
            is_full = length == window
            tokens = jnp.where(is_full, jnp.roll(tokens, -1), tokens)
            place = jnp.where(is_full, window - 1, length)
            tokens = jnp.where(jnp.arange(window) == place, token, tokens)
            return (tokens, place + 1), token

        return jax.lax.scan(step, (tokens, length), jnp.arange(num_tokens))[1]

    def sample(
        params: Any,
        prompt: Any,
        key: PRNGKeyArray,
        *,
        num_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Int[np.ndarray, " num_tokens"]:
        prompt = np.asarray(prompt, np.int32)[-window:]
        if not prompt.size or prompt.min() < 0 or prompt.max() >= vocab_size:
            raise sk.DataError(
                f"sample: expected a prompt of tokens from 0 to {vocab_size - 1}, at "
                f"least one, found {prompt[:8].tolist()}."
            )
        tokens = np.zeros(window, np.int32)
        tokens[: prompt.size] = prompt
        options = {"num_tokens": num_tokens, "temperature": temperature, "top_k": top_k}
        return np.asarray(run(params, tokens, np.int32(prompt.size), key, **options))

    return sample


def draw(
    logits: Float[Array, " vocab"],
    key: PRNGKeyArray,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Int[Array, ""]:
    """Draws a token, of softmax(logits / temperature).

    Args:
        logits: Unnormalised log-probabilities.
        key: The key of this one token.
        temperature: 0 takes the most likely, the first of equals.
        top_k: Only tokens as likely as the k-th are drawn, which may be more than k;
            None draws all.

    Example:
        >>> int(draw(jnp.array([0.0, 9.0, 1.0]), jax.random.key(0), temperature=0))
        1
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    if top_k is not None and top_k < logits.size:
        least = jnp.sort(logits)[-top_k]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)
