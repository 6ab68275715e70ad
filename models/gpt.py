"""A decoder-only transformer in Flax NNX, GPT-2 and Llama being two of its settings.

Owns the architecture and its options. Every parameter carries logical axes as NNX
metadata; nothing here knows of meshes or devices. Invariants: the function computed
depends neither on `scan_layers` nor on `remat`, no gradient contains a scatter, and a
dropout mask depends on the key and on the place in the network alone. Dropout acts on
the embeddings and on what each sublayer adds, not on attention weights.

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

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

import shardkit as sk

__all__ = ["GPT", "GPTConfig", "build"]

AXIS_RULES: dict[str, str | None] = {
    "embed": "fsdp",
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), "tensor"),
}
DType = Literal["float32", "bfloat16"]
Dims = Mapping[str, int]
FloatBTD = Float[Array, "B T D"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GPTConfig:
    """The options of a model; the defaults make a small Llama over bytes.

    Raises:
        ConfigError: Naming every option with a value that cannot be used.
    """

    vocab_size: int = 256
    num_layers: int = 4
    num_heads: int = 4  # of the queries
    num_kv_heads: int | None = None  # shared by groups of query heads; None: num_heads
    embed_dim: int = 128  # the width of the residual stream
    mlp_dim: int = 384
    max_sequence_length: int = 256
    norm: Literal["rms", "layer"] = "rms"  # before sublayers and before the logits
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0  # the base of RoPE's wavelengths
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    use_bias: bool = False  # in projections and layer norms
    tie_embeddings: bool = True  # the embedding table also makes the logits
    dropout: float = 0.0
    remat: bool = False  # compute blocks anew in the backward pass, to save memory
    scan_layers: bool = False  # stack the blocks and loop, to compile faster
    compute_dtype: DType = "float32"  # norms, softmax and loss are always float32
    param_dtype: DType = "float32"

    def __post_init__(self):
        _check(self)

    @property
    def head_dim(self) -> int:
        """The width of one head."""
        return self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with the default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @classmethod
    def gpt2(cls, **overrides: Any) -> "GPTConfig":
        """Returns GPT-2 124M, with what is overridden."""
        data = {"vocab_size": 50_257, "max_sequence_length": 1024, "dropout": 0.1}
        sizes = {"num_layers": 12, "num_heads": 12, "embed_dim": 768, "mlp_dim": 3072}
        kinds = {"norm": "layer", "positions": "learned", "mlp": "gelu"}
        return _config(data | sizes | kinds | {"use_bias": True} | overrides)

    @classmethod
    def llama(cls, **overrides: Any) -> "GPTConfig":
        """Returns Llama 3.2 1B, its RoPE not stretched, with what is overridden."""
        sizes = {"num_layers": 16, "num_heads": 32, "embed_dim": 2048, "mlp_dim": 8192}
        rest = {"num_kv_heads": 8, "rope_theta": 500_000.0, "vocab_size": 128_256}
        return _config(sizes | rest | {"max_sequence_length": 8192} | overrides)


def _config(options: Mapping[str, Any]) -> GPTConfig:
    known = [field.name for field in dataclasses.fields(GPTConfig)]
    if unknown := sorted(set(options).difference(known)):
        close = difflib.get_close_matches(unknown[0], known, n=1)
        raise sk.ConfigError(
            f"models.gpt: unknown option {', '.join(map(repr, unknown))}; "
            + f"did you mean {close[0]!r}? " * len(close)
            + f"The options are preset, {', '.join(known)}."
        )
    return GPTConfig(**options)


def _check(config: GPTConfig) -> None:
    expected: dict[str, str] = {}
    for field in dataclasses.fields(GPTConfig):
        name, value, kind = field.name, getattr(config, field.name), field.type
        # By exact type: True is an instance of int.
        accepted: Any = {float: (int, float), int | None: (int, type(None))}
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                expected[name] = f"one of {', '.join(get_args(kind))}"
        elif type(value) not in accepted.get(kind, (kind,)):
            expected[name] = getattr(kind, "__name__", str(kind))
        elif kind in (int, int | None) and value is not None and value < 1:
            expected[name] = "at least 1"
    if not expected:
        multiple = config.num_heads * (2 if config.positions == "rope" else 1)
        if not 0.0 <= config.dropout < 1.0:
            expected["dropout"] = "at least 0 and less than 1"
        if not config.rope_theta > 0.0:
            expected["rope_theta"] = "more than 0"
        if config.embed_dim % multiple:
            expected["embed_dim"] = (
                f"a multiple of {multiple} (heads, twice that for rope)"
            )
        if config.num_heads % config.kv_heads:
            expected["num_kv_heads"] = f"a divisor of num_heads = {config.num_heads}"
    if expected:
        found = [(name, text, getattr(config, name)) for name, text in expected.items()]
        lines = (f"{name}: expected {text}, found {v!r}" for name, text, v in found)
        raise sk.ConfigError("GPTConfig: " + "; ".join(lines) + ".")


def _param(value: Array, *names: str) -> nnx.Param:
    # Flax would place the value at once, on a mesh; here the names are only noted.
    return nnx.Param(value, out_sharding=names, eager_sharding=False)


def _normal(config: GPTConfig, dims: Dims, rngs: nnx.Rngs, scale=1.0) -> nnx.Param:
    dtype = jnp.dtype(config.param_dtype)
    value = jax.random.normal(rngs.params(), tuple(dims.values()), dtype)
    return _param(0.02 * scale * value, *dims)


def _constant(config: GPTConfig, dims: Dims, value: float) -> nnx.Param:
    return _param(jnp.full(tuple(dims.values()), value, config.param_dtype), *dims)


def _fold_in(key: PRNGKeyArray | None, index: int | Array) -> PRNGKeyArray | None:
    return None if key is None else jax.random.fold_in(key, index)


class Linear(nnx.Module):
    """An einsum of `[B, T, …]` with a kernel, and perhaps a bias."""

    def __init__(
        self, config: GPTConfig, equation: str, dims: Dims, rngs: nnx.Rngs, scale=1.0
    ):
        self.equation = equation
        self.kernel = _normal(config, dims, rngs, scale)
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
    """Causal attention; groups of query heads share key/value heads."""

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

    def __call__(self, x_BTD: FloatBTD) -> FloatBTD:
        q_BTHK, k_BTGK, v_BTGK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.theta is not None:
            q_BTHK, k_BTGK = _rotate(q_BTHK, self.theta), _rotate(k_BTGK, self.theta)
        y_BTHK = jax.nn.dot_product_attention(
            q_BTHK, k_BTGK, v_BTGK, is_causal=True, implementation="xla"
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
        self.dropout = config.dropout
        self.attention_norm = Norm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_BTD: FloatBTD, key: PRNGKeyArray | None) -> FloatBTD:
        y_BTD = self.attention(self.attention_norm(x_BTD))
        x_BTD = x_BTD + sk.nn.dropout(y_BTD, _fold_in(key, 0), self.dropout)
        y_BTD = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + sk.nn.dropout(y_BTD, _fold_in(key, 1), self.dropout)


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
        table = functools.partial(_normal, config, rngs=rngs)
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
        self, tokens_BT: Int[Array, "B T"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T V"]:
        """Computes the logits of each next token, in the compute dtype.

        Args:
            tokens_BT: Token ids.
            key: For dropout; None for none.

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
        x_BTD = sk.nn.embed(table_VD, tokens_BT)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding[None, :length].astype(dtype)
        # Index 0 is the embeddings', layers follow from 1.
        x_BTD = sk.nn.dropout(x_BTD, _fold_in(key, 0), self.config.dropout)
        x_BTD = self.final_norm(self._run_layers(x_BTD, key))
        if self.head is None:
            return jnp.einsum("BTD,VD->BTV", x_BTD, table_VD)
        return jnp.einsum("BTD,DV->BTV", x_BTD, self.head[...].astype(dtype))

    def _run_layers(self, x_BTD: FloatBTD, key: PRNGKeyArray | None) -> FloatBTD:
        scan = self.config.scan_layers
        graphdef = nnx.graphdef(self.layers if scan else self.layers[0])

        def run(x_BTD, state, index):
            return nnx.merge(graphdef, state)(x_BTD, _fold_in(key, index))

        if self.config.remat:
            # Outside a scan, XLA's CSE would undo the recomputation.
            run = jax.checkpoint(run, prevent_cse=not scan)
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
        predicted from those before it. Its params are an `nnx.State`.

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
    config = presets[preset](**overrides) if preset else _config(overrides)

    def init(key: PRNGKeyArray) -> nnx.State:
        return nnx.state(GPT(config, nnx.Rngs(params=key)), nnx.Param)

    @functools.cache
    def graphdef() -> nnx.GraphDef:
        return nnx.graphdef(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(params=0))))

    def loss(params: Any, microbatch: Any, key: PRNGKeyArray | None) -> sk.LossOutput:
        tokens = microbatch["tokens"]
        inputs_BT, labels_BT = tokens[:, :-1], tokens[:, 1:]
        dropout_key = None if key is None else sk.keys.stream(key, "dropout")
        logits_BTV = nnx.merge(graphdef(), params)(inputs_BT, dropout_key)
        losses_BT = sk.nn.cross_entropy(logits_BTV, labels_BT)
        is_right_BT = jnp.argmax(logits_BTV, axis=-1) == labels_BT
        metrics = {"accuracy": jnp.sum(is_right_BT, dtype=jnp.float32)}
        return sk.LossOutput(losses_BT.sum(), jnp.float32(losses_BT.size), metrics)

    return sk.Model(
        init=init,
        loss=loss,
        eval_loss=lambda params, microbatch, key: loss(params, microbatch, None),
        axis_rules=AXIS_RULES,
    )
