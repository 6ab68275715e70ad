"""Scatter-free layers: pieces of a model whose gradients keep their bits.

The ordinary gradient of indexing is a scatter-add, which a GPU carries out with
atomics: the order of the additions, and so the last bits, differ from run to run.
The functions here compute the same values and put matrix products and masked sums
where the scatters would be.

Invariant: neither a result nor its gradient contains a scatter, and how the work is
cut depends on shapes only. No parameters live here and nothing is sharded here; a
model brings its own. Under `jax.shard_map` with `check_vma` on, a table has to vary
over the mesh axes its tokens vary over (`jax.lax.pcast`): the gradients written out
here sum over no mesh axis.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from shardkit.errors import ConfigError
from shardkit.logical_axes import auto_axes, constrain

__all__ = ["IN_PIECES", "cross_entropy", "dropout", "embed"]

IN_PIECES = "embed_in_pieces"
"""In the names of operations that look into pieces of a table, each by itself."""

# The one-hot matrix of the embedding's backward is cut to stay below this, but never
# into matrices too narrow to be multiplied well.
_ONE_HOT_LIMIT_BYTES = 32 * 2**20
_ONE_HOT_MIN_VOCAB = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(
    table: Float[Array, "vocab embed"],
    tokens: Int[Array, "*batch"],
    axis: str | None = None,
) -> Float[Array, "*batch embed"]:
    """Looks up one row of `table` for each token.

    The gradient of the table is a product with a one-hot matrix, accumulated in
    float32 and cut along the vocabulary, so that each row is summed in one piece.

    Args:
        table: One row for each entry of the vocabulary.
        tokens: Row numbers in [0, vocab). Others have no gradient.
        axis: The mesh axis of a group that cuts the vocabulary, if one does. Each
            device then looks into its own piece of the table, and the rows found are
            summed: XLA (of JAX 0.11 and 0.12) ends the process where it has to do so
            by itself, in several groups with another axis that cuts the tokens.

    Returns:
        The rows, in the dtype of `table`.

    Example:
        >>> embed(jnp.eye(3), jnp.array([2, 0])).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    vocab_size, embed_dim = table.shape
    tokens = _wide(tokens, vocab_size)
    if axis is None:
        return table[tokens]
    num_pieces = auto_axes().get(axis, 1)
    if num_pieces == 1 or vocab_size % num_pieces:
        with jax.named_scope(IN_PIECES):  # Of which there is one.
            return table[tokens]
    # Others than [0, vocab) have the rows that indexing gives them.
    tokens = jnp.where(tokens < 0, tokens + vocab_size, tokens)
    tokens = jnp.clip(tokens, 0, vocab_size - 1)
    size = vocab_size // num_pieces
    pieces = table.reshape(num_pieces, size, embed_dim)
    pieces = constrain(pieces, axis, None, ...)
    first = size * jnp.arange(num_pieces, dtype=tokens.dtype)
    places = tokens - jnp.expand_dims(first, range(1, 1 + tokens.ndim))
    places = constrain(places, axis, *[...] * tokens.ndim)
    with jax.named_scope(IN_PIECES):
        look_up = jax.vmap(lambda piece, place: piece.at[place].get(mode="clip"))
        rows = look_up(pieces, places)
    is_here = (places >= 0) & (places < size)
    found = jnp.where(is_here[..., None], rows, 0)
    return jax.lax.reduce_sum(found, axes=(0,))  # `jnp.sum` would send float32.


def _embed_forward(table, tokens, axis):
    # The table rides along for its shape and dtype alone; its values stay unread.
    return embed(table, tokens, axis), (table, tokens)


def _embed_backward(axis, residuals, cotangent):
    del axis
    table, tokens = residuals
    vocab_size, embed_dim = table.shape
    tokens = _wide(tokens, vocab_size).reshape(1, -1)
    cotangent = cotangent.reshape(-1, embed_dim)

    def sum_rows(vocab_ids):
        one_hot = (vocab_ids[:, None] == tokens).astype(cotangent.dtype)
        rows = jnp.matmul(one_hot, cotangent, preferred_element_type=jnp.float32)
        return rows.astype(table.dtype)

    row_bytes = tokens.size * cotangent.dtype.itemsize
    chunk = max(_ONE_HOT_LIMIT_BYTES // max(row_bytes, 1), _ONE_HOT_MIN_VOCAB)
    if chunk >= vocab_size:
        return sum_rows(jnp.arange(vocab_size, dtype=tokens.dtype)), None
    num_chunks = -(-vocab_size // chunk)
    vocab_ids = jnp.arange(num_chunks * chunk, dtype=tokens.dtype)
    rows = jax.lax.map(sum_rows, vocab_ids.reshape(num_chunks, chunk))
    rows = rows.reshape(-1, embed_dim)
    return jax.lax.slice_in_dim(rows, 0, vocab_size), None


embed.defvjp(_embed_forward, _embed_backward)


@jax.custom_vjp
def cross_entropy(
    logits: Float[Array, "*batch vocab"], labels: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Computes the negative log-likelihood of each label, in nats.

    The label's logit is a masked sum, not a gather, and the gradient is written out,
    so that the backward pass keeps nothing of the size of `logits` but `logits`.

    Args:
        logits: Unnormalised log-probabilities, of any float dtype.
        labels: The right entries, in [0, vocab).

    Returns:
        The losses, computed and returned in float32.

    Example:
        >>> losses = cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))
        >>> [round(loss, 4) for loss in losses.tolist()]
        [1.3863, 1.3863]
    """
    return _cross_entropy_forward(logits, labels)[0]


def _wide(ids, vocab_size):
    """Entries in a dtype that has room for all numbers of the vocabulary.

    Bytes know 256, and those of a larger vocabulary would begin again at 0.
    """
    has_room = jnp.iinfo(ids.dtype).max >= vocab_size - 1
    return ids if has_room else ids.astype(jnp.int32)


def _is_label(logits, labels):
    labels = _wide(labels, logits.shape[-1])
    vocab_ids = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    return vocab_ids == labels[..., None]


def _cross_entropy_forward(logits, labels):
    logits_f32 = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits_f32, axis=-1)
    label_logit = jnp.where(_is_label(logits, labels), logits_f32, 0.0).sum(axis=-1)
    return log_normalizer - label_logit, (logits, labels, log_normalizer)


def _cross_entropy_backward(residuals, cotangent):
    logits, labels, log_normalizer = residuals
    probability = jnp.exp(logits.astype(jnp.float32) - log_normalizer[..., None])
    error = probability - _is_label(logits, labels).astype(jnp.float32)
    return (cotangent[..., None] * error).astype(logits.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def dropout(
    x: Float[Array, "*dims"], key: PRNGKeyArray | None, rate: float
) -> Float[Array, "*dims"]:
    """Zeroes elements at random and scales the rest up, so that the mean stays.

    The mask is a function of `key` and of the shape of `x`, and of nothing else.

    Args:
        x: What to thin out.
        key: The key of this one mask; None, as in evaluation, returns `x` untouched.
        rate: The probability of a zero, in [0, 1); 0 returns `x` untouched.

    Raises:
        ConfigError: If `rate` is not in [0, 1).

    Example:
        >>> sorted(set(dropout(jnp.ones(64), jax.random.key(0), 0.5).tolist()))
        [0.0, 2.0]

    References:
        Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from
        Overfitting (JMLR 2014).
    """
    if not 0.0 <= rate < 1.0:
        raise ConfigError(
            f"dropout rate must be at least 0 and less than 1, found {rate!r}; "
            "0 turns dropout off."
        )
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x * (1.0 / (1.0 - rate)), jnp.zeros_like(x))
