"""How a quantised checkpoint stores its weights: `Quantization`. `quantization_config.py` reads it from config.json.

A quantised weight [O, I] is a tensor of codes and a tensor of scales: the weight is (code - zero) * scale. A scale
covers a block of outputs and inputs. Integers may have zeros, one for each scale.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

# The kinds of codes. Those of 4 bits lie in memory as two inputs in a byte, the first in the lower half. INT4 are 0 to
# 15, and their zero is 8 if they have none of their own.
FP8, INT8, INT4, FP4 = "float8_e4m3fn", "int8", "int4", "float4_e2m1"
_NAMES = {FP8: "fp8 (e4m3)", INT8: "int8", INT4: "int4", FP4: "fp4 (e2m1)"}
NIBBLES = (INT4, FP4)
_LINEAR = "Linear"  # a target: all linear layers that no other group names
# Tensors of quantised activations and caches. Activations keep their dtype here; `kv_scales.py` may read the cache's.
_UNUSED = (
    "input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "kv_scale", "q_scale",
    "input_global_scale", "weight_shape", "g_idx", "qzeros", "input_zero_point", "output_zero_point", "q_zero_point",
    "k_zero_point", "v_zero_point",
)  # fmt: skip


ALL_INPUTS = 1 << 22  # inputs of a block; no weight has as many


class Grid(NamedTuple):
    """The scales of a weight [..., N, D], which is a part of a larger one: each covers a block of `rows` outputs and
    `columns` inputs. The part begins `first_row` outputs and `first_column` inputs after the start of a block, whose
    scale it has whole.

    `nibbles` is the kind of codes of 4 bits, None for others. `groups`: if not 0, each input names the one of as many
    groups of inputs that it belongs to, whatever `columns` says.
    """

    rows: int
    columns: int
    first_row: int = 0
    first_column: int = 0
    nibbles: str | None = None
    groups: int = 0

    def shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """The number of blocks that cover N outputs and D inputs, along each."""
        wide = self.groups or -(-(self.first_column + inputs) // self.columns)
        return -(-(self.first_row + outputs) // self.rows), wide


class Packing(NamedTuple):
    """How numbers [O, I] are stored: `bits` of each in words of `dtype`, which run along `axis` (0: outputs, 1:
    inputs), lowest bits first. `order` has the place of each number in its word, if it is another. `transposed`: as
    [I, O]. `plus` is added to each number, modulo its bits, and `word_plus` to each word before it is split, with
    carries from number to number."""

    bits: int
    dtype: str = "int32"
    axis: int = 1
    transposed: bool = False
    order: tuple[int, ...] | None = None
    plus: int = 0
    word_plus: int = 0

    @property
    def per_word(self) -> int:
        return {"int32": 32, "uint8": 8}.get(self.dtype, self.bits) // self.bits

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the stored tensor of numbers [..., O, I]."""
        *lead, outputs, inputs = shape
        sizes = [outputs, inputs]
        sizes[self.axis] = -(-sizes[self.axis] // self.per_word)
        return (*lead, *(reversed(sizes) if self.transposed else sizes))


class Stored(NamedTuple):
    """A tensor of a quantised weight: the possible ends of its name, in the place of "weight", and how it is packed;
    None: as it is."""

    names: tuple[str, ...]
    packing: Packing | None = None


@dataclass(frozen=True)
class WeightFormat:
    """How a weight [O, I] is stored. `codes`: their kind. `block`: the outputs and inputs of a scale; None: a scale
    for each output, or one for all.

    `weight`, `scale`, `zero`, `order` and `factor` are the tensors: codes; scales; zeros, if any; the group of each
    input, if inputs have any order; a number by which all scales are divided, if any, or multiplied if
    `factor_multiplies`.
    """

    codes: str
    block: tuple[int, int] | None
    scale: Stored
    weight: Stored = Stored(("weight",))
    zero: Stored | None = None
    order: Stored | None = None
    factor: Stored | None = None
    factor_multiplies: bool = False

    def __str__(self) -> str:
        by = "outputs" if self.block is None else "blocks of {} x {}".format(*self.block)
        if self.block is not None and self.block[0] == 1:
            by = f"groups of {self.block[1]} inputs"
        zeros = " with zero points" if self.zero else ""
        return f"{_NAMES[self.codes]} by {by}{zeros}{' in any order' if self.order else ''}"

    @property
    def companions(self) -> tuple[str, ...]:
        """What belongs to the codes: the ends of the parameters' names."""
        parts = {"scale": self.scale, "zero": self.zero, "order": self.order}
        return tuple(name for name, stored in parts.items() if stored is not None)

    def grid(self, first_output: int, first_input: int, inputs: int) -> Grid:
        """The blocks of a part that begins at these outputs and inputs of the weight, which has `inputs` in all."""
        nibbles = self.codes if self.codes in NIBBLES else None
        if self.block is None:
            return Grid(1, ALL_INPUTS, nibbles=nibbles)
        rows, columns = self.block
        if self.order is not None:
            return Grid(rows, columns, first_output % rows, 0, nibbles, -(-inputs // columns))
        return Grid(rows, columns, first_output % rows, first_input % columns, nibbles)


@dataclass(frozen=True)
class Quantization:
    """The formats of a checkpoint's linear layers. `groups` are formats with the modules that they are for; `ignored`
    modules are not quantised. A module is given by its name, a part of it between dots, a regular expression after
    "re:", or the class "Linear". `rounds`: the checkpoint's weights are plain, and are rounded to codes as they are
    read. `kv_cache`: the kind of KV cache that the checkpoint was made for (`kv_cache_scheme`), or None."""

    method: str
    groups: tuple[tuple[WeightFormat, tuple[str, ...]], ...]
    ignored: tuple[str, ...] = ()
    rounds: bool = False
    kv_cache: str | None = None

    def describe(self) -> str:
        """One line for reports."""
        formats = ", ".join(dict.fromkeys(str(each) for each, _ in self.groups))
        return f"{formats}, rounded while loading" if self.rounds else f"{self.method}: {formats}"

    def of(self, module: str, listed: bool = True) -> WeightFormat | None:
        """The format of a linear layer or of stacked experts by its name; None: it is not quantised. Without `listed`
        the `ignored` modules have a format too."""
        if listed and module in self._ignored:
            return None
        named = (formats for formats, names in self._named if module in names)
        return next(named, self._of_linear)

    @property
    def has_int8(self) -> bool:
        """Whether weights have int8 codes, which a GPU widens whole for products of many rows."""
        return any(formats.codes == INT8 for formats, _ in self.groups)

    @cached_property
    def _ignored(self) -> _Names:
        return _Names(self.ignored)

    @cached_property
    def _named(self) -> list[tuple[WeightFormat, _Names]]:
        return [(formats, _Names(set(targets) - {_LINEAR})) for formats, targets in self.groups]

    @cached_property
    def _of_linear(self) -> WeightFormat | None:
        return next((formats for formats, targets in self.groups if _LINEAR in targets), None)

    @staticmethod
    def is_unused(name: str) -> bool:
        """Whether a tensor that is not read may be left out: one of quantised activations and caches, or one that says
        again what config.json does."""
        marks = (".", "_proj_")  # of single tensors, and of fused experts
        ends = tuple(f"{mark}{end}" for mark in marks for end in _UNUSED)
        return name.endswith((*ends, "_proj_shape"))


# What `quantize` makes of a checkpoint: fp8 in the format of Qwen's own FP8 checkpoints, and int4 by groups.
ROUNDS_TO = {
    "fp8": Quantization(
        "fp8", ((WeightFormat(FP8, (128, 128), Stored(("weight_scale_inv",))), (_LINEAR,)),), rounds=True
    ),
    "int4": Quantization(
        "int4", ((WeightFormat(INT4, (1, 128), Stored(("weight_scale",))), (_LINEAR,)),), rounds=True
    ),
}


class _Names:
    """Patterns of module names."""

    def __init__(self, patterns: Collection[str]) -> None:
        self._parts = {pattern for pattern in patterns if not pattern.startswith("re:")}
        self._last_words = {part.rpartition(".")[2] for part in self._parts}
        self._regexes = [re.compile(each.removeprefix("re:")) for each in patterns if each.startswith("re:")]
        self._known: dict[str, bool] = {}  # a plan of each rank asks for each of thousands of experts

    def __contains__(self, module: str) -> bool:
        if module not in self._known:
            self._known[module] = self._match(module)
        return self._known[module]

    def _match(self, module: str) -> bool:
        words = module.split(".")
        ends = [end for end, word in enumerate(words, 1) if word in self._last_words]
        parts = (".".join(words[start:end]) for end in ends for start in range(end))
        return any(part in self._parts for part in parts) or any(
            regex.match(module) for regex in self._regexes
        )
