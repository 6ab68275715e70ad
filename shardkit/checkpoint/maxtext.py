"""MaxText's layouts of Llama-style decoders, scanned and unscanned.

Owns the rules between the variables of its Linen collection and the params of
`models.gpt`, both ways. Invariant: the function computed stays the same.

MaxText differs from `models.gpt` in names and in three more things. It stacks layers
along dim 1 unless `param_scan_axis` says otherwise. It does not divide attention scores
by √head_dim: that is folded into the query kernel, which is therefore multiplied here,
rounded once; where head_dim is a power of 4 that is exact both ways. Its RoPE turns
halves of a head, as ours, but for `rope_type: llama3.1`, which turns neighbours.

Verified with the wheel of maxtext 0.2.5, whose model on random params computes our
logits, for both layouts and both kinds of RoPE, tied and not. Where it is tied MaxText
rounds the table to bfloat16 before it makes logits, which `models.gpt` does not. See
there `layers/attentions.py` (`init_query_w`), `layers/embeddings.py`
(`RotaryEmbedding`, `LLaMARotaryEmbedding`, `attend_on_embedding`),
`layers/nnx_decoders.py` (`param_scan_axis`) and `common/checkpointing.py`, by which
models of NNX are stored as those of Linen are.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from shardkit.checkpoint.families import Decoder, Layout
from shardkit.checkpoint.remap import Remap
from shardkit.checkpoint.remap_op import Op, unfit
from shardkit.checkpoint.remap_ops import Reshape, Stack, Transpose, Unstack
from shardkit.checkpoint.rules import Rule
from shardkit.checkpoint.value_views import round_once
from shardkit.checkpoint.views import Box, View, is_floating
from shardkit.errors import ConfigError, RestoreError

__all__ = [
    "MaxTextLayout",
    "Scale",
    "from_maxtext",
    "infer_maxtext",
    "to_maxtext",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxTextLayout:
    """How MaxText laid out the params of a decoder.

    Attributes:
        scan_axis: The dim along which layers are stacked, 1 by MaxText's default; None
            for layers by themselves.
        rotates_pairs: Whether RoPE turns neighbours, as `rope_type: llama3.1` does.
        normalizes_logits: MaxText's `normalize_embedding_logits`, true by its default:
            where the embedding also makes the logits, they are divided by √embed_dim.
        prefix: What every path begins with.
    """

    scan_axis: int | None = 1
    rotates_pairs: bool = False
    normalizes_logits: bool = True
    prefix: str = "params/params/"


_LAYER = {
    "pre_self_attention_layer_norm/scale": ("attention_norm/scale", 1),
    "post_self_attention_layer_norm/scale": ("mlp_norm/scale", 1),
    "self_attention/query/kernel": ("attention/query/kernel", 3),
    "self_attention/key/kernel": ("attention/key/kernel", 3),
    "self_attention/value/kernel": ("attention/value/kernel", 3),
    "self_attention/out/kernel": ("attention/out/kernel", 3),
    "mlp/wi_0/kernel": ("mlp/gate/kernel", 2),
    "mlp/wi_1/kernel": ("mlp/up/kernel", 2),
    "mlp/wo/kernel": ("mlp/down/kernel", 2),
}
"""Their names of what a layer has → ours, and how many dims it has by itself."""


class _ScaledView(View):
    def __init__(self, source: View, scale: float):
        self.shape, self.dtype = source.shape, source.dtype
        self._source, self._scale = source, scale

    def read(self, box: Box) -> np.ndarray:
        """Multiplies in float64 and rounds once: see `View.read`."""
        found = self._source.read(box).astype(np.float64) * self._scale
        return round_once(found, self.dtype)


@dataclasses.dataclass(frozen=True)
class Scale(Op):
    """Multiplies floats by a factor, in float64 and rounded once.

    Args:
        factor: By which. The inverse divides: it gives back the bits if the factor is
            a power of 2, and else what they stand for to the last bit or so.
    """

    word = "scale"
    factor: float

    def apply(self, views: Sequence[View]) -> list[View]:
        """Multiplies each: see `Op.apply`."""
        for view in views:
            if not is_floating(view.dtype):
                raise unfit(self, "floats", view)
        return [_ScaledView(view, self.factor) for view in views]

    def inverse(self, before: Sequence[View] | None = None) -> Op:
        """Returns the division."""
        return Scale(1 / self.factor)

    def for_moments(self) -> Op | None:
        """Is refused: a first and a second moment take other powers of the factor."""
        raise ConfigError(
            f"{self.describe()}: the moments of a scaled parameter scale otherwise; "
            "drop them and initialise them anew"
        )


def from_maxtext(decoder: Decoder, theirs: MaxTextLayout, ours: Layout) -> Remap:
    """Makes the rules from MaxText's params to ours.

    Args:
        decoder: The numbers; `infer_maxtext` reads them off a tree.
        theirs: The layout of the tree that there is.
        ours: The layout of the tree to be made.

    Raises:
        ConfigError: If `models.gpt` does not compute what MaxText would.
    """
    _check(decoder, theirs)
    body = f"{theirs.prefix}decoder/"
    tops = {
        f"{theirs.prefix}token_embedder/embedding": "embedding",
        f"{body}decoder_norm/scale": "final_norm/scale",
    }
    if not decoder.tied:
        tops[f"{body}logits_dense/kernel"] = "head"
    rules = [Rule(source, ours.path(target)) for source, target in tops.items()]
    layers = "layers_{i}/" if theirs.scan_axis is None else "layers/"
    for source, (target, num_dims) in _LAYER.items():
        ops = _move_layers(theirs.scan_axis, ours.scan_layers, num_dims)
        ops += _heads(target, decoder, theirs, ours)
        path = ours.path(f"layer/{target}")
        rules.append(Rule(f"{body}{layers}{source}", path, *ops))
    return Remap(rules)


def to_maxtext(decoder: Decoder, ours: Layout, theirs: MaxTextLayout) -> Remap:
    """Makes the rules from our params to MaxText's.

    Args:
        decoder: The numbers; `infer_decoder` reads them off a tree.
        ours: The layout of the tree that there is.
        theirs: The layout of the tree to be made.

    Raises:
        ConfigError: If MaxText would not compute what `models.gpt` does.
    """
    return from_maxtext(decoder, theirs, ours).inverse()


def _check(decoder: Decoder, theirs: MaxTextLayout) -> None:
    problems = {
        f"expected a Llama, found a {decoder.family}": decoder.family != "llama",
        "expected no biases, which a Llama of MaxText has not": decoder.use_bias,
        "the embedding also makes the logits and normalize_embedding_logits is true, "
        "so MaxText divides them by √embed_dim; models.gpt does not. If it was false "
        "in that run, say MaxTextLayout(normalizes_logits=False) or "
        "--no-normalize-logits": decoder.tied and theirs.normalizes_logits,
    }
    if found := [f"  {text}" for text, holds in problems.items() if holds]:
        raise ConfigError("\n".join(["MaxText:", *found]))


def _move_layers(scan_axis: int | None, is_stacked: bool, num_dims: int) -> list[Op]:
    """Makes our dims of a layer's array, or of all layers', of theirs."""
    if scan_axis is None:
        return [Stack("i")] if is_stacked else []
    if not is_stacked:
        return [Unstack("i", scan_axis)]
    if scan_axis == 0:
        return []
    others = [dim for dim in range(num_dims + 1) if dim != scan_axis]
    return [Transpose(scan_axis, *others)]


def _heads(
    target: str, decoder: Decoder, theirs: MaxTextLayout, ours: Layout
) -> list[Op]:
    """Makes our queries and keys of theirs, both in our layout."""
    is_query = target == "attention/query/kernel"
    if not is_query and target != "attention/key/kernel":
        return []
    ops: list[Op] = [Scale(decoder.head_dim**0.5)] * is_query
    if theirs.rotates_pairs:
        num_heads = decoder.num_heads if is_query else decoder.kv_heads
        outer = (decoder.num_layers,) * ours.scan_layers
        outer += (decoder.embed_dim, num_heads)
        whole, pairs = (*outer, decoder.head_dim), (*outer, decoder.head_dim // 2, 2)
        halves, num = (*outer, 2, decoder.head_dim // 2), len(outer)
        ops.append(Reshape(*pairs, was=whole))
        ops.append(Transpose(*range(num), num + 1, num))
        ops.append(Reshape(*whole, was=halves))
    return ops


def infer_maxtext(
    tree: Mapping[str, View],
    *,
    max_sequence_length: int | None = None,
    rope_theta: float | None = None,
    rotates_pairs: bool = False,
    normalizes_logits: bool = True,
    scan_axis: int = 1,
    prefix: str = "params/params/",
) -> tuple[Decoder, MaxTextLayout]:
    """Reads numbers and layout off the shapes of MaxText's params.

    Args:
        tree: Of MaxText.
        max_sequence_length: `max_target_length` of its config; shapes do not tell.
        rope_theta: `rope_max_timescale`, likewise.
        rotates_pairs: Whether `rope_type` is `llama3.1`, likewise.
        normalizes_logits: `normalize_embedding_logits`, likewise.
        scan_axis: `param_scan_axis`, used if layers are stacked.
        prefix: What the paths of the params begin with.

    Raises:
        RestoreError: If it is no Llama of MaxText.
    """
    query = f"{prefix}decoder/layers/self_attention/query/kernel"
    is_stacked = query in tree
    theirs = MaxTextLayout(
        scan_axis=scan_axis if is_stacked else None,
        rotates_pairs=rotates_pairs,
        normalizes_logits=normalizes_logits,
        prefix=prefix,
    )
    layer = f"{prefix}decoder/" + ("layers/" if is_stacked else "layers_0/")
    names = {
        "query": f"{layer}self_attention/query/kernel",
        "key": f"{layer}self_attention/key/kernel",
        "gate": f"{layer}mlp/wi_0/kernel",
        "embedding": f"{prefix}token_embedder/embedding",
    }
    num_dims = {"query": 3, "key": 3, "gate": 2, "embedding": 2}
    shapes: dict[str, list[int]] = {}
    for name, path in names.items():
        is_cut = is_stacked and name != "embedding"
        shape = list(tree[path].shape) if path in tree else []
        if len(shape) == num_dims[name] + is_cut:
            num_stacked = shape.pop(scan_axis) if is_cut else 0
            shapes[name] = [*shape, num_stacked]
    if bad := [path for name, path in names.items() if name not in shapes]:
        raise RestoreError(
            "expected the params of a Llama of MaxText, found nothing of the right "
            f"number of dims at {', '.join(bad)}. There are {', '.join([*tree][:6])}…"
        )
    embed_dim, num_heads, head_dim, num_layers = shapes["query"]
    while not is_stacked and query.replace("layers", f"layers_{num_layers}") in tree:
        num_layers += 1
    decoder = Decoder(
        family="llama",
        num_layers=num_layers,
        num_heads=num_heads,
        kv_heads=shapes["key"][1],
        head_dim=head_dim,
        embed_dim=embed_dim,
        mlp_dim=shapes["gate"][1],
        vocab_size=shapes["embedding"][0],
        max_sequence_length=max_sequence_length,
        rope_theta=rope_theta,
        tied=f"{prefix}decoder/logits_dense/kernel" not in tree,
        use_bias=False,
    )
    return decoder, theirs
