"""The sharding of weights, as a table: which slice of which checkpoint tensor fills which parameter of a rank.

A checkpoint tensor is split along at most one dimension; expert tensors are also split by expert. `_LAYER_RULES` and
`_MODEL_RULES` have the `Split` of every tensor. The scales of quantised weights follow from the weights' pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from math import prod

from qwen3_dist.config import ModelConfig
from qwen3_dist.expert_placement import Placements, even_placements
from qwen3_dist.layout import Layout, RankCoords, padded_range
from qwen3_dist.weights.pieces import Piece
from qwen3_dist.weights.scale_pieces import with_scales


class Split(Enum):
    """How a tensor is split over ranks."""

    WHOLE = "every rank has the whole tensor"
    FIRST = "tp rank 0 has it, the others zeros: a bias that is added once"
    HEADS = "rows of this rank's heads"
    KV_GROUPS = "rows of this rank's KV groups; several ranks may have the same"
    HEAD_INPUTS = "columns of this rank's heads"
    COLUMNS = "rows of this rank's hidden columns"
    COLUMN_INPUTS = "columns of this rank's hidden columns"
    VOCAB = "rows of this rank's part of the vocabulary"
    OUTPUTS = "rows of this rank's part of the outputs"


# In deterministic mode no product is split by its inputs.
_DETERMINISTIC = dict.fromkeys((Split.HEAD_INPUTS, Split.COLUMN_INPUTS, Split.FIRST), Split.OUTPUTS)


_Shape = Callable[[ModelConfig], tuple[int, ...]]
# (checkpoint name, parameter name, split, shape of the whole, condition)
_Rule = tuple[str, str, Split, _Shape, Callable[[ModelConfig], bool]]


def _always(config: ModelConfig) -> bool:
    return True


def _norm(theirs: str, ours: str, dim: _Shape, when: Callable[[ModelConfig], bool] = _always) -> list[_Rule]:
    return [
        (f"{theirs}.weight", f"{ours}.scale", Split.WHOLE, dim, when),
        (f"{theirs}.bias", f"{ours}.shift", Split.WHOLE, dim, lambda c: c.rms_norm_shift and when(c)),
    ]


def _linear(theirs: str, ours: str, split: Split, shape: _Shape, bias: Split) -> list[_Rule]:
    return [
        (f"{theirs}.weight", f"{ours}.weight", split, shape, _always),
        (f"{theirs}.bias", f"{ours}.bias", bias, lambda c: shape(c)[:1], lambda c: c.attention_bias),
    ]


def _shape(*dims: str) -> _Shape:
    """A shape from the names of config fields; "a*b" multiplies two."""
    return lambda config: tuple(prod(getattr(config, name) for name in dim.split("*")) for dim in dims)


_EMBEDDING = _shape("vocab_size", "emb_dim")
_MODEL_RULES: list[_Rule] = [
    ("model.embed_tokens.weight", "tok_emb.weight", Split.VOCAB, _EMBEDDING, _always),
    *_norm("model.norm", "final_norm", _shape("emb_dim")),
    ("lm_head.weight", "out_head.weight", Split.VOCAB, _EMBEDDING, lambda c: not c.tie_word_embeddings),
    ("score.weight", "score", Split.WHOLE, lambda c: (1, c.emb_dim), lambda c: c.has_score),
]
_LAYER_RULES: list[_Rule] = [
    *_norm("input_layernorm", "norm1", _shape("emb_dim")),
    *_norm("post_attention_layernorm", "norm2", _shape("emb_dim")),
    *_linear(
        "self_attn.q_proj",
        "att.W_query",
        Split.HEADS,
        _shape("n_heads*head_dim", "emb_dim"),
        bias=Split.HEADS,
    ),
    *_linear(
        "self_attn.k_proj",
        "att.W_key",
        Split.KV_GROUPS,
        _shape("n_kv_groups*head_dim", "emb_dim"),
        bias=Split.KV_GROUPS,
    ),
    *_linear(
        "self_attn.v_proj",
        "att.W_value",
        Split.KV_GROUPS,
        _shape("n_kv_groups*head_dim", "emb_dim"),
        bias=Split.KV_GROUPS,
    ),
    *_linear(
        "self_attn.o_proj",
        "att.out_proj",
        Split.HEAD_INPUTS,
        _shape("emb_dim", "n_heads*head_dim"),
        bias=Split.FIRST,
    ),
    *_norm("self_attn.q_norm", "att.q_norm", _shape("head_dim"), lambda c: c.qk_norm),
    *_norm("self_attn.k_norm", "att.k_norm", _shape("head_dim"), lambda c: c.qk_norm),
]
_DENSE_RULES: list[_Rule] = [
    ("mlp.gate_proj.weight", "ff.fc1.weight", Split.COLUMNS, _shape("hidden_dim", "emb_dim"), _always),
    ("mlp.up_proj.weight", "ff.fc2.weight", Split.COLUMNS, _shape("hidden_dim", "emb_dim"), _always),
    ("mlp.down_proj.weight", "ff.fc3.weight", Split.COLUMN_INPUTS, _shape("emb_dim", "hidden_dim"), _always),
]
_FUSED = "mlp.experts.gate_up_proj"
_GATE_RULE: _Rule = (
    "mlp.gate.weight",
    "ff.gate.weight",
    Split.WHOLE,
    _shape("num_experts", "emb_dim"),
    _always,
)


class WeightPlan:
    """The pieces of every rank for one checkpoint. `names` are its tensors, which tell whether experts are fused."""

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        names: set[str],
        placements: Placements | None = None,
        deterministic: bool = False,
    ) -> None:
        self._deterministic = deterministic
        self._placements = placements or even_placements(config, layout.ep)
        self._config = config
        self._layout = layout
        self._names = names
        # Layers whose experts are one tensor, however its parts are called.
        fused = (name.partition(_FUSED) for name in names)
        self._fused = {layer for layer, found, _ in fused if found}

    def pieces(self, at: RankCoords) -> Iterator[Piece]:
        """The pieces that the rank at `at` must read, in checkpoint order.

        The first stage has the embedding, the last the norm and the head. Blocks are numbered within the stage.
        """
        return (piece for piece in self.all_pieces(at) if not piece.is_empty)

    def all_pieces(self, at: RankCoords) -> Iterator[Piece]:
        """`pieces`, and an empty one for each weight of which this rank has padding alone."""
        return self._quantized(self._plain_pieces(at))

    def plain_pieces(self, at: RankCoords) -> Iterator[Piece]:
        """`pieces` as they were if no weight were quantised."""
        return (piece for piece in self._plain_pieces(at) if not piece.is_empty)

    def _quantized(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            yield from with_scales(piece, self._config.quantization, self._names)

    def _plain_pieces(self, at: RankCoords) -> Iterator[Piece]:
        config, last = self._config, at.stage == self._layout.pp - 1
        embeds = at.stage == 0 or (last and config.tie_word_embeddings)
        for rule in _MODEL_RULES:
            if embeds if rule[1] == "tok_emb.weight" else last:
                yield from self._apply(rule, "", "", at)
        layers = self._layout.layers_of(at.stage, config.n_layers)
        for block, layer in enumerate(layers):
            prefixes = (f"model.layers.{layer}.", f"blocks.{block}.")
            moe = config.is_moe_layer(layer)
            for rule in [*_LAYER_RULES, *([_GATE_RULE] if moe else _DENSE_RULES)]:
                yield from self._apply(rule, *prefixes, at)
            if moe:
                hosted = self._placements[layer].hosted[at.ep_rank]
                yield from self._experts(*prefixes, at, hosted)

    def expert_pieces(self, layer: int, experts: Sequence[int], at: RankCoords) -> Iterator[Piece]:
        """The pieces of these experts of a layer, with target parameters fc1, fc2, fc3 and their scales."""
        pieces = self._quantized(self._experts(f"model.layers.{layer}.", "", at, experts))
        return (piece for piece in pieces if not piece.is_empty)

    def expected_names(self) -> set[str]:
        """The names of all tensors that ranks read, which are those of one rank without others."""
        alone = Layout()
        whole = WeightPlan(self._config, alone, self._names)
        return {piece.source for piece in whole.pieces(alone.coords(0))}

    def ignorable(self, name: str) -> bool:
        """Whether a tensor that no rank reads may be in a checkpoint: a copy of a tied head, old rotary buffers, and
        scales of activations and of the KV cache."""
        tied_head = name == "lm_head.weight" and self._config.tie_word_embeddings
        if self._config.quantization is not None and self._config.quantization.is_unused(name):
            return True
        return tied_head or name.endswith("rotary_emb.inv_freq")

    def _apply(self, rule: _Rule, their_prefix: str, our_prefix: str, at: RankCoords) -> Iterator[Piece]:
        theirs, ours, split, shape_of, condition = rule
        split = _DETERMINISTIC.get(split, split) if self._deterministic else split
        if not condition(self._config) or (split is Split.FIRST and at.tp_rank != 0):
            return
        shape = shape_of(self._config)
        dim, part = self._part(split, shape, at)
        before = (slice(None),) * dim
        index = (*before, slice(part.start, part.stop))
        target = (*before, slice(0, len(part)))
        yield Piece(their_prefix + theirs, shape, index, our_prefix + ours, target)

    def _part(self, split: Split, shape: tuple[int, ...], at: RankCoords) -> tuple[int, range]:
        """The dimension of `split`, and this rank's indices along it without padding."""
        config, tp = self._config, self._layout.tp
        if split in (Split.WHOLE, Split.FIRST):
            return 0, range(shape[0])
        if split is Split.KV_GROUPS:
            per_rank = max(1, config.n_kv_groups // tp)
            first = at.tp_rank * config.n_kv_groups // tp
            return 0, range(first * config.head_dim, (first + per_rank) * config.head_dim)
        dim = 1 if split in (Split.HEAD_INPUTS, Split.COLUMN_INPUTS) else 0
        return dim, padded_range(shape[dim], tp, at.tp_rank)[0]

    def _experts(self, theirs: str, ours: str, at: RankCoords, hosted: Sequence[int]) -> Iterator[Piece]:
        config = self._config
        everything = slice(None)
        columns, filled = self._slices(config.moe_hidden_dim, at)
        # of the down projection: the slices of the whole, and those of this rank's part
        outputs, inputs, to_outputs, to_inputs = everything, columns, everything, filled
        if self._deterministic:
            outputs, to_outputs = self._slices(config.emb_dim, at)
            inputs, to_inputs = everything, everything
        ours = f"{ours}ff.experts." if ours else ""
        if theirs in self._fused:
            inner = config.moe_hidden_dim
            gate_up = (config.num_experts, 2 * inner, config.emb_dim)
            down = (config.num_experts, config.emb_dim, inner)
            ups = slice(inner + columns.start, inner + columns.stop)
            for experts, stack in _runs(hosted):
                source, target = f"{theirs}{_FUSED}", (stack, filled, everything)
                yield Piece(source, gate_up, (experts, columns, everything), f"{ours}fc1", target)
                yield Piece(source, gate_up, (experts, ups, everything), f"{ours}fc2", target)
                source, target = f"{theirs}mlp.experts.down_proj", (stack, to_outputs, to_inputs)
                yield Piece(source, down, (experts, outputs, inputs), f"{ours}fc3", target)
            return
        wide, tall = (config.moe_hidden_dim, config.emb_dim), (config.emb_dim, config.moe_hidden_dim)
        for place, expert in enumerate(hosted):
            at_place = slice(place, place + 1)
            base = f"{theirs}mlp.experts.{expert}."
            for name, fc in (("gate_proj", "fc1"), ("up_proj", "fc2")):
                target = (at_place, filled, everything)
                yield Piece(f"{base}{name}.weight", wide, (columns,), f"{ours}{fc}", target)
            target = (at_place, to_outputs, to_inputs)
            yield Piece(f"{base}down_proj.weight", tall, (outputs, inputs), f"{ours}fc3", target)

    def _slices(self, dim: int, at: RankCoords) -> tuple[slice, slice]:
        """An etp rank's part of `dim` columns, and the same counted from its first, without padding."""
        part, _ = padded_range(dim, self._layout.etp, at.etp_rank)
        return slice(part.start, part.stop), slice(0, len(part))


def _runs(hosted: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yields each run of consecutive experts in a stack: the slice of experts, and their slice of the stack."""
    start = 0
    for place in range(1, len(hosted) + 1):
        if place == len(hosted) or hosted[place] != hosted[place - 1] + 1:
            yield slice(hosted[start], hosted[place - 1] + 1), slice(start, place)
            start = place
