"""A GPT whose MLPs are experts, of which a router gives every token a few.

Owns routing, experts and their balance; attention and norms are those of `gpt.py`.
Invariants: a token's experts depend on its own microbatch and on tokens before it
alone, of equal probabilities the first expert is taken, and no gradient contains a
scatter: tokens come to experts and back by products with one-hot matrices.

The balance is that of the whole global batch. The loss of Switch is E · Σ f P, with
the share f of all tokens that chose an expert and its mean probability P; a product of
two means is no sum over microbatches. But f has no gradient. So f is taken from the
steps before, as state of the model that microbatches leave and that is averaged over
all of them, and what is left is linear in P: a sum over tokens like any other loss. The
gradient is that of Switch over the global batch, with an f one step old.

Shape suffixes:
    B rows, T positions, N tokens of a microbatch (B T), D embed, V vocabulary,
    E experts, K experts of a token, C places of an expert, M mlp, L layers

References:
    Shazeer et al., Outrageously Large Neural Networks (ICLR 2017).
    Fedus et al., Switch Transformers (JMLR 2022): the balance, and capacity.
    Qiu et al., Demons in the Detail: On Implementing Load Balancing Loss for Training
    Specialized Mixture-of-Expert Models (2025): why the balance of the global batch.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

import shardkit as sk
from models import gpt
from models.generation import sampler
from models.gpt import FloatBTD, GPTConfig
from models.sharing import share_stream

__all__ = ["Experts", "Routed", "build", "route"]

AXIS_RULES = {**gpt.AXIS_RULES, "expert": "expert"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """How tokens are routed.

    Raises:
        ConfigError: Naming every option with a value that cannot be used.
    """

    num_experts: int
    experts_per_token: int
    capacity_factor: float
    """Places of all experts beside what is needed if all get the same."""
    balance_weight: float
    load_decay: float

    def __post_init__(self):
        most = self.num_experts
        wrong = {
            "num_experts": ("at least 1", self.num_experts >= 1),
            "experts_per_token": (f"1 to {most}", 1 <= self.experts_per_token <= most),
            "capacity_factor": ("more than 0", self.capacity_factor > 0),
            "balance_weight": ("at least 0", self.balance_weight >= 0),
            "load_decay": ("at least 0 and less than 1", 0 <= self.load_decay < 1),
        }
        problems = [
            f"{name}: expected {text}, found {getattr(self, name)!r}"
            for name, (text, is_right) in wrong.items()
            if not is_right
        ]
        if problems:
            raise sk.ConfigError("models.moe: " + "; ".join(problems) + ".")

    def capacity(self, num_tokens: int) -> int:
        """Places of one expert for the tokens of a microbatch, on any devices."""
        wanted = self.experts_per_token * num_tokens * self.capacity_factor
        return min(num_tokens, math.ceil(wanted / self.num_experts))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """Where tokens go.

    Attributes:
        dispatch_NEC: 1 where a token has a place of an expert.
        combine_NEC: The same, times the weight of the expert's answer.
        share_E: The part of all choices that fell on each expert, with or without room.
        num_dropped: Choices for which there was no room.
    """

    dispatch_NEC: Float[Array, "N E C"]
    combine_NEC: Float[Array, "N E C"]
    share_E: Float[Array, " E"]
    num_dropped: Float[Array, ""]


def route(
    probability_NE: Float[Array, "N E"], *, num_chosen: int, capacity: int
) -> Routed:
    """Gives every token its most likely experts, as long as they have room.

    Places are taken in the order of the tokens, and what a token is given does not
    depend on later ones, as it would if all first choices came before all second ones.

    Args:
        probability_NE: Of every expert for every token.
        num_chosen: Experts of a token, the first of equal ones.
        capacity: Places of an expert.

    Example:
        >>> probability = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5]])
        >>> routed = route(probability, num_chosen=1, capacity=2)
        >>> routed.dispatch_NEC.sum(2).tolist()
        [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
        >>> float(routed.num_dropped)
        1.0
    """
    num_tokens, num_experts = probability_NE.shape
    left_NE = jax.lax.stop_gradient(probability_NE)
    chosen = []
    for _ in range(num_chosen):
        # Not `top_k`: its gradient is a scatter, and argmax takes the first of equals.
        is_best = jnp.argmax(left_NE, -1)[:, None] == jnp.arange(num_experts)[None]
        left_NE = jnp.where(is_best, -1.0, left_NE)
        chosen.append(is_best)
    chosen_NKE = jnp.stack(chosen, axis=1)
    gate_NK = jnp.sum(jnp.where(chosen_NKE, probability_NE[:, None], 0.0), -1)
    if num_chosen > 1:
        gate_NK = gate_NK / jnp.sum(gate_NK, -1, keepdims=True)
    place_NK = _places(chosen_NKE)
    at_NKC = place_NK[..., None] == jnp.arange(capacity)[None, None]
    at_NKEC = (chosen_NKE[..., None] & at_NKC[:, :, None]).astype(jnp.float32)
    kept = jnp.sum(at_NKEC)
    return Routed(
        dispatch_NEC=at_NKEC.sum(1),
        combine_NEC=jnp.sum(at_NKEC * gate_NK[..., None, None], 1),
        share_E=chosen_NKE.astype(jnp.float32).mean((0, 1)),
        num_dropped=num_tokens * num_chosen - kept,
    )


def _places(chosen_NKE: Array) -> Int[Array, "N K"]:
    """How many choices of the same expert come before each."""
    num_tokens, num_chosen, num_experts = chosen_NKE.shape
    flat = chosen_NKE.reshape(-1, num_experts).astype(jnp.int32)
    before = jnp.cumsum(flat, axis=0) - flat
    return jnp.sum(before * flat, -1).reshape(num_tokens, num_chosen)


class Experts(nnx.Module):
    """Gated MLPs behind a router."""

    def __init__(self, config: GPTConfig, num_experts: int, rngs: nnx.Rngs):
        expert, embed = {"expert": num_experts}, {"embed": config.embed_dim}
        mlp = {"mlp": config.mlp_dim}
        # Every device needs to know of all experts whom a token prefers.
        self.router = gpt.normal(config, embed | {"choice": num_experts}, rngs)
        self.gate = gpt.normal(config, expert | embed | mlp, rngs)
        self.up = gpt.normal(config, expert | embed | mlp, rngs)
        scale = (2 * config.num_layers) ** -0.5
        self.down = gpt.normal(config, expert | mlp | embed, rngs, scale)

    def __call__(
        self,
        x_BTD: FloatBTD,
        *,
        num_chosen: int,
        capacity: int | None = None,
        per_row: bool = False,
    ) -> tuple[FloatBTD, Float[Array, "N E"], Routed]:
        """Returns what the experts say, the router's probabilities, and who went where.

        Args:
            x_BTD: The tokens; one without a place gets zeros.
            num_chosen: Experts of a token.
            capacity: Places of an expert; None for enough.
            per_row: Whether these are for each row, or for all of them together.
        """
        x_RND = x_BTD if per_row else x_BTD.reshape(1, -1, x_BTD.shape[-1])
        probability_RNE = jax.nn.softmax(x_RND @ self.router[...], axis=-1)
        places = capacity or x_RND.shape[1]
        send = functools.partial(route, num_chosen=num_chosen, capacity=places)
        routed = jax.vmap(send)(probability_RNE)
        x_RECD = jnp.einsum("RNEC,RND->RECD", routed.dispatch_NEC, x_RND)
        if per_row:
            # Devices share rows, then experts, then rows: tokens change places by one
            # all-to-all, and by another one on their way back.
            x_RECD = sk.constrain(x_RECD, "expert", ..., ..., ...)
        x_RECD = sk.constrain(x_RECD, ..., "expert", ..., ...)
        gate_RECM = jax.nn.silu(jnp.einsum("RECD,EDM->RECM", x_RECD, self.gate[...]))
        up_RECM = jnp.einsum("RECD,EDM->RECM", x_RECD, self.up[...])
        y_RECD = jnp.einsum("RECM,EMD->RECD", gate_RECM * up_RECM, self.down[...])
        if per_row:
            y_RECD = sk.constrain(y_RECD, "expert", ..., ..., ...)
        y_RND = jnp.einsum("RNEC,RECD->RND", routed.combine_NEC, y_RECD)
        all_rows = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        together = Routed(
            all_rows(routed.dispatch_NEC),
            all_rows(routed.combine_NEC),
            routed.share_E.mean(0),
            routed.num_dropped.sum(),
        )
        return y_RND.reshape(x_BTD.shape), all_rows(probability_RNE), together


class _Block(gpt.Block):
    """One layer: attention, then experts."""

    def __init__(self, config: GPTConfig, num_experts: int, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = gpt.Norm(config)
        self.attention = gpt.Attention(config, rngs)
        self.experts_norm = gpt.Norm(config)
        self.experts = Experts(config, num_experts, rngs)

    def __call__(self, x_BTD, key, **options):
        y_BTD = self.attention(self.attention_norm(x_BTD))
        x_BTD = self._add(x_BTD, y_BTD, gpt.fold_in(key, 0))
        y_BTD, *rest = self.experts(self.experts_norm(x_BTD), **options)
        return self._add(x_BTD, y_BTD, gpt.fold_in(key, 1)), *rest


class MoE(nnx.Module):
    """The whole model: token ids in, logits and what the routers did out."""

    def __init__(self, config: GPTConfig, num_experts: int, rngs: nnx.Rngs):
        self.config = config
        dims = {"vocab": config.vocab_size, "embed": config.embed_dim}
        self.embedding = gpt.normal(config, dims, rngs)
        layers = range(config.num_layers)
        self.layers = nnx.List([_Block(config, num_experts, rngs) for _ in layers])
        self.final_norm = gpt.Norm(config)

    def __call__(
        self, tokens_BT: Int[Array, "B T"], key: PRNGKeyArray | None, **options: Any
    ) -> tuple[Float[Array, "B T V"], list[tuple[Array, Routed]]]:
        """Computes logits, and of every layer probabilities and where tokens went."""
        x_BTD: Any = sk.nn.embed(self.embedding[...], tokens_BT, "tensor")
        x_BTD = share_stream(self.config, x_BTD)
        x_BTD = sk.nn.dropout(x_BTD, gpt.fold_in(key, 0), self.config.dropout)
        routed = []
        for index, layer in enumerate(self.layers):
            x_BTD, *rest = layer(x_BTD, gpt.fold_in(key, index + 1), **options)
            routed.append(tuple(rest))
        x_BTD = self.final_norm(x_BTD)
        return jnp.einsum("BTD,VD->BTV", x_BTD, self.embedding[...]), routed


def build(
    vocab_size: int = 256,
    num_layers: int = 2,
    num_heads: int = 4,
    embed_dim: int = 64,
    mlp_dim: int = 96,
    max_sequence_length: int = 128,
    dropout: float = 0.0,
    num_experts: int = 4,
    experts_per_token: int = 2,
    capacity_factor: float = 1.25,
    balance_weight: float = 0.01,
    load_decay: float = 0.9,
    capacity_per_row: bool = False,
) -> sk.Model:
    """Makes the model that a config names.

    Args:
        vocab_size: As the further ones up to `dropout`, those of `gpt.GPTConfig`.
        num_layers: Layers, all of them with experts.
        num_heads: Heads of attention.
        embed_dim: The width of the residual stream.
        mlp_dim: The width of one expert.
        max_sequence_length: Positions at most.
        dropout: Of the embeddings and of what sublayers add.
        num_experts: Experts of a layer.
        experts_per_token: How many a token gets.
        capacity_factor: Places of all experts, beside what is needed if all of them
            get the same; a microbatch's own tokens are counted.
        balance_weight: How much the balance counts beside the cross entropy.
        load_decay: How much of the shares that the balance goes by a step keeps.
        capacity_per_row: Whether experts have their places for each row by itself.
            Devices that share rows and experts then exchange tokens by all-to-all;
            places for all rows together make each device see all tokens.

    Returns:
        A model over microbatches `{"tokens": int32 [rows, T + 1]}`. The metric
        `dropped` is the part of all choices without a place, `balance` is 1 where all
        experts get the same, or their probabilities are alike.

    Raises:
        ConfigError: Naming what cannot be used.

    Example:
        >>> model = build(num_layers=1, embed_dim=8, mlp_dim=4)
        >>> model.init(jax.random.key(0)).state["load"].value
        Array([[0.25, 0.25, 0.25, 0.25]], dtype=float32)
    """
    config = GPTConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
        max_sequence_length=max_sequence_length,
        dropout=dropout,
    )
    moe = MoEConfig(
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        capacity_factor=capacity_factor,
        balance_weight=balance_weight,
        load_decay=load_decay,
    )
    num_chosen = experts_per_token

    def init(key: PRNGKeyArray) -> sk.Variables:
        params = nnx.state(MoE(config, num_experts, nnx.Rngs(params=key)), nnx.Param)
        load_LE = jnp.full((num_layers, num_experts), 1 / num_experts, jnp.float32)
        return sk.Variables(params, {"load": sk.axes(load_LE, "layers", "choice")})

    @functools.cache
    def graphdef() -> nnx.GraphDef:
        make = lambda: MoE(config, num_experts, nnx.Rngs(params=0))  # noqa: E731
        return nnx.graphdef(nnx.eval_shape(make))

    def run(params: Any, microbatch: Any, key: PRNGKeyArray | None) -> Any:
        inputs_BT = microbatch["tokens"][:, :-1]
        row = capacity_per_row
        capacity = moe.capacity(inputs_BT.shape[1] if row else inputs_BT.size)
        options = {"num_chosen": num_chosen, "capacity": capacity, "per_row": row}
        logits, routed = nnx.merge(graphdef(), params)(inputs_BT, key, **options)
        return gpt.score(logits, microbatch), routed

    def loss(
        params: Any, state: Any, microbatch: Any, key: PRNGKeyArray | None
    ) -> sk.LossOutput:
        dropout_key = None if key is None else sk.keys.stream(key, "dropout")
        out, routed = run(params, microbatch, dropout_key)
        balance, dropped = jnp.float32(0), jnp.float32(0)
        for load_E, (probability_NE, where) in zip(state["load"], routed, strict=True):
            balance += num_experts * jnp.sum(probability_NE * load_E[None])
            dropped += where.num_dropped / num_chosen
        balance, dropped = balance / num_layers, dropped / num_layers
        share_LE = jnp.stack([where.share_E for _, where in routed])
        metrics = {"cross_entropy": out.loss_sum, "balance": balance}
        return sk.LossOutput(
            out.loss_sum + balance_weight * balance,
            out.weight,
            {**out.metrics, **metrics, "dropped": dropped},
            {"load": load_decay * state["load"] + (1 - load_decay) * share_LE},
        )

    def eval_loss(
        params: Any, state: Any, microbatch: Any, key: PRNGKeyArray | None
    ) -> sk.LossOutput:
        return dataclasses.replace(run(params, microbatch, None)[0], state=state)

    def logits(params: Any, tokens_BT: Any) -> Array:
        return nnx.merge(graphdef(), params)(tokens_BT, None, num_chosen=num_chosen)[0]

    return sk.Model(
        init=init,
        loss=loss,
        eval_loss=eval_loss,
        axis_rules=AXIS_RULES,
        sample=sampler(logits, vocab_size, max_sequence_length),
    )
