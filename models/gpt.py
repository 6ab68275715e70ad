"""A decoder-only transformer in Flax NNX, GPT-2 and Llama being two of its settings.

Owns the architecture; its options are in `gpt_config.py`. Every parameter carries
logical axes as NNX metadata. How a group of devices shares activations is
said in `sharing.py`; nothing here knows of meshes. Invariants: the function
computed depends neither on `scan_layers` nor on `remat`, no gradient contains a
scatter, and a dropout mask depends on the key and on the place in the network alone.
Dropout acts on the embeddings and on what each sublayer adds, not on attention weights.

Shape suffixes:
    B rows, T positions, D embed, H query heads, G key/value heads, K head dim,
    M mlp, V vocabulary

References:
    Radford et al., Language Models are Unsupervised Multitask Learners (2019).
    Touvron et al., LLaMA: Open and Efficient Foundation Language Models (2023).
    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding (2021).
    Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models from
    Multi-Head Checkpoints (2023).
    Shazeer, GLU Variants Improve Transformer (2020).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import shardkit as sk
from models.generation import sampler
from models.gpt_config import GPTConfig, checked_config
from models.sharing import keep_input, recomputed, share_stream, whole_context

__all__ = [
    "AXIS_RULES",
    "GPT",
    "Attention",
    "GPTConfig",
    "Norm",
    "build",
    "fold_in",
    "normal",
    "score",
]

AXIS_RULES: dict[str, str | None] = {
    "embed": "fsdp",
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), "tensor"),
}
Dims = Mapping[str, int]
FloatBTD = Float[Array, "B T D"]
Mask = Bool[Array, "B 1 T T"] | None


def _param(value: Array, *names: str) -> nnx.Param:
    # Flax would place the value at once, on a mesh; here the names are only noted.
    return nnx.Param(value, out_sharding=names, eager_sharding=False)


def normal(config: GPTConfig, dims: Dims, rngs: nnx.Rngs, scale=1.0) -> nnx.Param:
    """Draws a parameter with deviation 0.02 · `scale`; its dims name its axes."""
    dtype = jnp.dtype(config.param_dtype)
    value = jax.random.normal(rngs.params(), tuple(dims.values()), dtype)
    return _param(0.02 * scale * value, *dims)


def _constant(config: GPTConfig, dims: Dims, value: float) -> nnx.Param:
    return _param(jnp.full(tuple(dims.values()), value, config.param_dtype), *dims)


def fold_in(key: PRNGKeyArray | None, index: int | Array) -> PRNGKeyArray | None:
    """Derives the key of a place in the network; of no key, none."""
    return None if key is None else jax.random.fold_in(key, index)


class Linear(nnx.Module):
    """An einsum of `[B, T, …]` with a kernel, and perhaps a bias."""

    def __init__(
        self, config: GPTConfig, equation: str, dims: Dims, rngs: nnx.Rngs, scale=1.0
    ):
        self.equation = equation
        self.kernel = normal(config, dims, rngs, scale)
        # The bias has the dims of the output but for B and T.
        num_out = len(equation.split("->BT")[1])
        bias_dims = dict(list(dims.items())[-num_out:])
        self.bias = _constant(config, bias_dims, 0.0) if config.use_bias else None

    def __call__(self, x: Float[Array, "B T *in"]) -> Float[Array, "B T *out"]:
        y = jnp.einsum(self.equation, x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[None, None].astype(x.dtype)


class Norm(nnx.Module):
    """RMS norm or layer norm, computed in float32."""

    def __init__(self, config: GPTConfig):
        self.subtract_mean = config.norm == "layer"
        has_bias = self.subtract_mean and config.use_bias
        dims = {"norm": config.embed_dim}
        self.scale = _constant(config, dims, 1.0)
        self.bias = _constant(config, dims, 0.0) if has_bias else None

    def __call__(self, x_BTD: FloatBTD) -> FloatBTD:
        """Normalises every position by itself."""
        y_BTD = x_BTD.astype(jnp.float32)
        if self.subtract_mean:
            y_BTD = y_BTD - jnp.mean(y_BTD, axis=-1, keepdims=True)
        mean_square = jnp.mean(jnp.square(y_BTD), axis=-1, keepdims=True)
        y_BTD = y_BTD * jax.lax.rsqrt(mean_square + 1e-5) * self.scale[None, None]
        if self.bias is not None:
            y_BTD = y_BTD + self.bias[None, None]
        return y_BTD.astype(x_BTD.dtype)


def _rotate(x_BTHK: Float[Array, "B T H K"], theta: float) -> Float[Array, "B T H K"]:
    """Turns pairs of elements by angles that grow with the position."""
    num_positions, half = x_BTHK.shape[1], x_BTHK.shape[3] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.outer(jnp.arange(num_positions, dtype=jnp.float32), frequency)
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BTHK.dtype)


class Attention(nnx.Module):
    """Causal attention; groups of query heads share key/value heads.

    RoPE turns by the place in the row, also in packed ones: only distances matter.
    """

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        self.theta = config.rope_theta if config.positions == "rope" else None
        embed, head_dim = {"embed": config.embed_dim}, {"head_dim": config.head_dim}
        heads = {"heads": config.num_heads, **head_dim}
        kv_heads = {"kv_heads": config.kv_heads, **head_dim}
        self.query = Linear(config, "BTD,DHK->BTHK", embed | heads, rngs)
        self.key = Linear(config, "BTD,DGK->BTGK", embed | kv_heads, rngs)
        self.value = Linear(config, "BTD,DGK->BTGK", embed | kv_heads, rngs)
        scale = (2 * config.num_layers) ** -0.5
        self.out = Linear(config, "BTHK,HKD->BTD", heads | embed, rngs, scale)

    def __call__(self, x_BTD: FloatBTD, may_see_B1TT: Mask = None) -> FloatBTD:
        """Lets every position look at itself and those before it."""
        q_BTHK, k_BTGK, v_BTGK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.theta is not None:
            q_BTHK, k_BTGK = _rotate(q_BTHK, self.theta), _rotate(k_BTGK, self.theta)
        k_BTGK, v_BTGK = whole_context(k_BTGK), whole_context(v_BTGK)
        y_BTHK = jax.nn.dot_product_attention(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            mask=may_see_B1TT,
            is_causal=True,
            implementation="xla",
        )
        return self.out(y_BTHK)


class MLP(nnx.Module):
    """Two projections around a GELU, or three around a gated SiLU."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        embed, mlp = {"embed": config.embed_dim}, {"mlp": config.mlp_dim}
        up = functools.partial(Linear, config, "BTD,DM->BTM", embed | mlp, rngs)
        self.gate = up() if config.mlp == "swiglu" else None
        self.up = up()
        scale = (2 * config.num_layers) ** -0.5
        self.down = Linear(config, "BTM,MD->BTD", mlp | embed, rngs, scale)

    def __call__(self, x_BTD: FloatBTD) -> FloatBTD:
        up_BTM = self.up(x_BTD)
        if self.gate is None:
            return self.down(jax.nn.gelu(up_BTM, approximate=True))
        return self.down(jax.nn.silu(self.gate(x_BTD)) * up_BTM)


class Block(nnx.Module):
    """One layer: what attention and MLP say is added to the residual stream."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = Norm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x_BTD: FloatBTD, key: PRNGKeyArray | None, may_see_B1TT: Mask
    ) -> FloatBTD:
        y_BTD = self.attention(self.attention_norm(x_BTD), may_see_B1TT)
        x_BTD = self._add(x_BTD, y_BTD, fold_in(key, 0))
        y_BTD = self.mlp(self.mlp_norm(x_BTD))
        return self._add(x_BTD, y_BTD, fold_in(key, 1))

    def _add(
        self, x_BTD: FloatBTD, y_BTD: FloatBTD, key: PRNGKeyArray | None
    ) -> FloatBTD:
        y_BTD = share_stream(self.config, y_BTD)
        return x_BTD + sk.nn.dropout(y_BTD, key, self.config.dropout)


class GPT(nnx.Module):
    """The whole model: token ids in, logits out.

    Args:
        config: The options.
        rngs: Its `params` stream makes the weights: normal with deviation 0.02,
            less by √(2 `num_layers`) for what is added to the residual stream.
    """

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        self.config = config
        embed, vocab = {"embed": config.embed_dim}, {"vocab": config.vocab_size}
        position = {"position": config.max_sequence_length}
        is_learned, is_tied = config.positions == "learned", config.tie_embeddings
        table = functools.partial(normal, config, rngs=rngs)
        self.embedding = table(vocab | embed)
        self.position_embedding = table(position | embed) if is_learned else None
        self.head = None if is_tied else table(embed | vocab)
        self.final_norm = Norm(config)
        block = lambda key: Block(config, nnx.Rngs(params=key))  # noqa: E731
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers: Any
        if config.scan_layers:
            metadata = {nnx.PARTITION_NAME: "layers"}
            self.layers = nnx.vmap(block, transform_metadata=metadata)(keys)
        else:
            self.layers = nnx.List([block(key) for key in keys])

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        key: PRNGKeyArray | None = None,
        *,
        segments_BT: Int[Array, "B T"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Computes the logits of each next token, in the compute dtype.

        Args:
            tokens_BT: Token ids.
            key: For dropout; None for none.
            segments_BT: Which document of a packed row a token is of; attention stays
                within. None: a row is one document.
            positions_BT: The place in the document; None: the place in the row.

        Raises:
            DataError: If there are more than `max_sequence_length` positions.
        """
        limit, length = self.config.max_sequence_length, tokens_BT.shape[1]
        if length > limit:
            raise sk.DataError(
                f"models.gpt: expected at most max_sequence_length = {limit} "
                f"positions, found {length}. Cut the data shorter or raise the limit."
            )
        dtype = jnp.dtype(self.config.compute_dtype)
        table_VD = self.embedding[...].astype(dtype)
        x_BTD = share_stream(self.config, sk.nn.embed(table_VD, tokens_BT, "tensor"))
        if self.position_embedding is not None and positions_BT is None:
            x_BTD = x_BTD + self.position_embedding[None, :length].astype(dtype)
        elif self.position_embedding is not None:
            table = self.position_embedding[...].astype(dtype)
            x_BTD = x_BTD + sk.nn.embed(table, positions_BT)
        may_see_B1TT = None
        if segments_BT is not None:
            may_see_B1TT = segments_BT[:, None, :, None] == segments_BT[:, None, None]
        # Index 0 is the embeddings', layers follow from 1.
        x_BTD = sk.nn.dropout(x_BTD, fold_in(key, 0), self.config.dropout)
        x_BTD = self.final_norm(self._run_layers(x_BTD, key, may_see_B1TT))
        if self.head is None:
            return jnp.einsum("BTD,VD->BTV", x_BTD, table_VD)
        return jnp.einsum("BTD,DV->BTV", x_BTD, self.head[...].astype(dtype))

    def _run_layers(
        self, x_BTD: FloatBTD, key: PRNGKeyArray | None, may_see_B1TT: Mask
    ) -> FloatBTD:
        scan = self.config.scan_layers
        graphdef = nnx.graphdef(self.layers if scan else self.layers[0])

        def run(x_BTD, state, index):
            block = nnx.merge(graphdef, state)
            return block(keep_input(x_BTD), fold_in(key, index), may_see_B1TT)

        if self.config.remat:
            run = recomputed(run, self.config)
        if not scan:
            for index, block in enumerate(self.layers):
                x_BTD = run(x_BTD, nnx.state(block), index + 1)
            return x_BTD
        indices = jnp.arange(1, self.config.num_layers + 1)
        step = lambda x, layer: (run(x, *layer), None)  # noqa: E731
        return jax.lax.scan(step, x_BTD, (nnx.state(self.layers), indices))[0]


def build(preset: str | None = None, **overrides: Any) -> sk.Model:
    """Makes the model that a config names; the options are `GPTConfig`'s.

    Args:
        preset: `"gpt2_124m"`, `"llama_1b"`, or None for the defaults.
        **overrides: Options, over those of the preset.

    Returns:
        A model over microbatches `{"tokens": int32 [rows, T + 1]}`, each token
        predicted from those before it. Its params are an `nnx.State`. If there are,
        `weights` (float `[rows]` or `[rows, T]`) say how much predictions count, and
        `segments` and `positions` (int32 `[rows, T + 1]`) keep the documents of packed
        rows apart: see `sk.sources.Packed`.

    Raises:
        ConfigError: For an unknown preset or option, or an unusable value.

    Example:
        >>> model = build(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16)
        >>> params = model.init(jax.random.key(0))
        >>> params["embedding"].out_sharding
        ('vocab', 'embed')
    """
    presets = {"gpt2_124m": GPTConfig.gpt2, "llama_1b": GPTConfig.llama}
    if preset is not None and preset not in presets:
        raise sk.ConfigError(
            f"models.gpt: preset: expected one of {', '.join(presets)}, or none at "
            f"all, found {preset!r}."
        )
    config = presets[preset](**overrides) if preset else checked_config(overrides)

    def init(key: PRNGKeyArray) -> nnx.State:
        return nnx.state(GPT(config, nnx.Rngs(params=key)), nnx.Param)

    @functools.cache
    def graphdef() -> nnx.GraphDef:
        return nnx.graphdef(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(params=0))))

    def logits(params: Any, tokens_BT: Any, key: Any = None, **packed: Any) -> Array:
        return nnx.merge(graphdef(), params)(tokens_BT, key, **packed)

    def loss(params: Any, microbatch: Any, key: PRNGKeyArray | None) -> sk.LossOutput:
        dropout_key = None if key is None else sk.keys.stream(key, "dropout")
        tokens = microbatch["tokens"]
        packed = {
            f"{name}_BT": microbatch[name][:, :-1]
            for name in ("segments", "positions")
            if name in microbatch
        }
        return score(logits(params, tokens[:, :-1], dropout_key, **packed), microbatch)

    return sk.Model(
        init=init,
        loss=loss,
        eval_loss=lambda params, microbatch, key: loss(params, microbatch, None),
        axis_rules=AXIS_RULES,
        sample=sampler(logits, config.vocab_size, config.max_sequence_length),
    )


def score(logits_BTV: Float[Array, "B T V"], microbatch: Any) -> sk.LossOutput:
    """Sums the losses of predicted tokens, each times its weight if there are any.

    Args:
        logits_BTV: Of `microbatch["tokens"][:, :-1]`.
        microbatch: `{"tokens": int32 [rows, T + 1]}`, and perhaps `"weight"` of rows,
            or `"weights"` of rows or of predictions `[rows, T]`.
    """
    labels_BT = microbatch["tokens"][:, 1:]
    losses_BT = sk.nn.cross_entropy(logits_BTV, labels_BT)
    is_right_BT = jnp.argmax(logits_BTV, axis=-1) == labels_BT
    weights = [microbatch[name] for name in ("weight", "weights") if name in microbatch]
    if not weights:
        metrics = {"accuracy": jnp.sum(is_right_BT, dtype=jnp.float32)}
        return sk.LossOutput(losses_BT.sum(), jnp.float32(losses_BT.size), metrics)
    weights_BT = jnp.ones_like(losses_BT)
    for weight in weights:
        weights_BT = weights_BT * weight.reshape(len(labels_BT), -1)
    metrics = {"accuracy": jnp.sum(is_right_BT * weights_BT, dtype=jnp.float32)}
    return sk.LossOutput((losses_BT * weights_BT).sum(), weights_BT.sum(), metrics)
