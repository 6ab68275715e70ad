"""The decoders that foreign formats have in common with `models.gpt`.

Owns the numbers of a decoder, how they are read off a tree of its params, and the
paths of those params. Invariant: a `Decoder` is what a tree or a config says of itself;
nothing is assumed in silence. It holds no foreign names.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from shardkit.checkpoint.views import View
from shardkit.errors import RestoreError

__all__ = ["Decoder", "Layout", "infer_decoder", "infer_layout", "model_options"]

Family = Literal["gpt2", "llama"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder-only transformer, in numbers.

    Attributes:
        family: `"gpt2"`: learned positions, layer norms, GELU, biases everywhere.
            `"llama"`: RoPE that turns halves of a head, RMS norms, SwiGLU.
        num_layers: Blocks.
        num_heads: Heads of the queries.
        kv_heads: Heads of keys and values.
        head_dim: The width of one head.
        embed_dim: The width of the residual stream.
        mlp_dim: The width inside an MLP.
        vocab_size: Tokens.
        max_sequence_length: Positions; None if unknown.
        rope_theta: The base of RoPE's wavelengths; None if unknown, or for GPT-2.
        tied: Whether the embedding table also makes the logits.
        use_bias: Whether projections have biases.
    """

    family: Family
    num_layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    embed_dim: int
    mlp_dim: int
    vocab_size: int
    max_sequence_length: int | None = None
    rope_theta: float | None = None
    tied: bool
    use_bias: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How the params of a decoder are laid out in a tree of ours.

    Attributes:
        scan_layers: Whether the layers are stacked along a first dim.
        prefix: What every path begins with.
        suffix: What every path ends with; Flax NNX puts `/value` there.
    """

    scan_layers: bool = False
    prefix: str = "params/"
    suffix: str = "/value"

    def path(self, name: str) -> str:
        """Spells the path of a param, or the pattern of those of all layers.

        Example:
            >>> Layout().path("layer/mlp/up/kernel")
            'params/layers/{i}/mlp/up/kernel/value'
            >>> Layout(scan_layers=True, suffix="").path("layer/mlp/up/kernel")
            'params/layers/mlp/up/kernel'
        """
        layers = "layers/" if self.scan_layers else "layers/{i}/"
        return self.prefix + re.sub("^layer/", layers, name) + self.suffix


def infer_layout(tree: Mapping[str, View], prefix: str = "params/") -> Layout:
    """Finds out how a tree of ours is laid out.

    Args:
        tree: With the params of a decoder under `prefix`.
        prefix: Where they are; `ema/` for averaged ones.

    Raises:
        RestoreError: If there is no embedding, hence no decoder.
    """
    layouts = [
        Layout(scan_layers=scan, prefix=prefix, suffix=suffix)
        for scan in (False, True)
        for suffix in ("/value", "")
    ]
    for layout in layouts:
        kernel = layout.path("layer/attention/query/kernel").replace("{i}", "0")
        if layout.path("embedding") in tree and kernel in tree:
            return layout
    raise RestoreError(
        f"expected the params of a decoder of models.gpt under {prefix}, with "
        f"{prefix}embedding and {prefix}layers/…/attention/query/kernel; found "
        f"{', '.join(list(tree)[:8]) or 'nothing'}"
    )


def infer_decoder(
    tree: Mapping[str, View],
    layout: Layout,
    *,
    max_sequence_length: int | None = None,
    rope_theta: float | None = None,
) -> Decoder:
    """Reads the numbers of a decoder off the shapes of its params.

    Args:
        tree: Of ours.
        layout: Its layout.
        max_sequence_length: What the shapes of a Llama do not say.
        rope_theta: Likewise.

    Raises:
        RestoreError: If it is neither a GPT-2 nor a Llama, saying why.
    """
    names = {
        re.sub(r"^layers/(\d+/)?", "layer/", path.removesuffix(layout.suffix))
        for path in (
            path.removeprefix(layout.prefix)
            for path in tree
            if path.startswith(layout.prefix)
        )
    }
    has_bias = [name for name in names if name.endswith("/bias")]
    marks = {
        "learned positions": "position_embedding" in names,
        "layer norms with biases": "final_norm/bias" in names,
        "an MLP without gate": "layer/mlp/gate/kernel" not in names,
    }
    if len(set(marks.values())) > 1:
        found = ", ".join(mark for mark, there in marks.items() if there)
        raise RestoreError(
            f"{layout.prefix}: expected a GPT-2 (learned positions, layer norms with "
            f"biases, an MLP without gate) or a Llama (none of these), found {found} "
            "alone. Other formats have no name for it."
        )
    is_gpt2 = all(marks.values())

    def shape(name: str) -> tuple[int, ...]:
        path = layout.path(name).replace("{i}", "0")
        if path not in tree:
            raise RestoreError(f"expected {path}, which is missing")
        lead = 1 if layout.scan_layers and name.startswith("layer/") else 0
        return tuple(tree[path].shape[lead:])

    query = layout.path("layer/attention/query/kernel")
    if layout.scan_layers:
        num_layers = tree[query].shape[0]
    else:
        num_layers = sum(
            query.replace("{i}", str(index)) in tree for index in range(len(tree))
        )
    vocab_size, embed_dim = shape("embedding")
    _, num_heads, head_dim = shape("layer/attention/query/kernel")
    if is_gpt2:
        max_sequence_length = shape("position_embedding")[0]
    return Decoder(
        family="gpt2" if is_gpt2 else "llama",
        num_layers=num_layers,
        num_heads=num_heads,
        kv_heads=shape("layer/attention/key/kernel")[1],
        head_dim=head_dim,
        embed_dim=embed_dim,
        mlp_dim=shape("layer/mlp/up/kernel")[1],
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        rope_theta=None if is_gpt2 else rope_theta,
        tied="head" not in names,
        use_bias=bool(has_bias),
    )


def model_options(decoder: Decoder, *, scan_layers: bool = False) -> dict[str, Any]:
    """Spells a decoder as the options of `models.gpt:build`.

    Raises:
        RestoreError: If `models.gpt` has no such decoder.
    """
    if decoder.num_heads * decoder.head_dim != decoder.embed_dim:
        raise RestoreError(
            f"expected heads as wide as the embedding, found {decoder.num_heads} heads "
            f"of {decoder.head_dim} and an embedding of {decoder.embed_dim}, which "
            "models.gpt does not have"
        )
    options: dict[str, Any] = {
        "vocab_size": decoder.vocab_size,
        "num_layers": decoder.num_layers,
        "num_heads": decoder.num_heads,
        "num_kv_heads": decoder.kv_heads,
        "embed_dim": decoder.embed_dim,
        "mlp_dim": decoder.mlp_dim,
        "max_sequence_length": decoder.max_sequence_length,
        "rope_theta": decoder.rope_theta,
        "use_bias": decoder.use_bias,
        "tie_embeddings": decoder.tied,
        "scan_layers": scan_layers,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if decoder.family == "gpt2":
        return options | {"norm": "layer", "positions": "learned", "mlp": "gelu"}
    return options | {"norm": "rms", "positions": "rope", "mlp": "swiglu"}
