"""Loads the weights of another checkpoint into the place of those that a finalized model has.

One block after the other is loaded, converted and copied, so memory holds one block more, and tensors keep their
addresses: fused kernels, CUDA graphs and the KV cache stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from qwen3_dist.errors import CheckpointError
from qwen3_dist.expert_placement import even_placements
from qwen3_dist.model.finalize import (
    convert_blocks,
    finalize_head,
    tensors_beside_blocks,
    tensors_of_block,
)
from qwen3_dist.model.quantized import Codes, Quantizable
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.kv_codes import CODES
from qwen3_dist.protocol.messages import Progress
from qwen3_dist.weights.kv_scales import read_kv_scales
from qwen3_dist.weights.loader import counting, open_model
from qwen3_dist.weights.version_files import require_unchanged
from qwen3_dist.weights_version import WeightsVersion


class Replacement:
    """This rank's part of other weights for `model`, in the directory `path`. Creating it reads headers alone.

    `int8` and `random` are as at the model's loading. Raises CheckpointError if the weights do not fit the model.
    """

    def __init__(
        self, weights: WeightsVersion, path: Path, model: Qwen3Model, int8: bool, random: bool = False
    ) -> None:
        self.weights, self.path, self._model, self._int8 = weights, path, model, int8
        require_unchanged(weights)
        placements = {
            **even_placements(model.config, model.parallel.ep.size),  # of the layers of other stages
            **{layer: moe.placement for layer, moe in model.moe_layers.items()},
        }
        self._new = open_model(path, model.config, model.parallel, model.dtype, model.ops, random, placements)
        if self._new.model.config != model.config:
            raise CheckpointError(f"the weights in {path} have no output head, and the model has one")
        if _codes_of(self._new.model) != _codes_of(model):
            raise CheckpointError(f"the weights in {path} are quantised otherwise than the model's")
        if (
            self._new.files is not None
            and model.kv_cache_dtype == CODES
            and model.config.quantization is not None
        ):
            read_kv_scales(self._new.model, self._new.files)
            if _kv_scales(self._new.model) != _kv_scales(model):
                raise CheckpointError(
                    f"the weights in {path} have other scales of an fp8 KV cache than the model's; load them anew"
                )
        if any(file.saved for file in model.adapter_files if file is not None):
            raise CheckpointError(
                "an adapter holds the whole of a router, which is kept as its difference to the old weights; unload "
                "the adapter, change the weights, and load it again"
            )
        self.num_bytes = self._new.num_bytes

    @torch.inference_mode()
    def load(self, progress: Progress | None = None) -> None:
        """Loads the weights; no step may run. May be called once.

        After an error (CheckpointError, OSError or one of torch's) some weights of the model are the new ones, and
        others are not; until the end `model.weights` is None.
        """
        old, new, device = self._model, self._new.model, self._model.device
        advance = counting(progress, self.num_bytes)
        old.weights = None
        beside = [module for name, module in new.named_modules() if not name.startswith("blocks.")]
        self._new.load(beside, device, advance)
        finalize_head(new, self._int8)
        _copy(tensors_beside_blocks(new), tensors_beside_blocks(old))
        for place, block in enumerate(new.blocks):
            self._new.load(block.modules(), device, advance)
            convert_blocks([block], self._int8)
            _copy(tensors_of_block(block), tensors_of_block(old.blocks[place]))
            cast(nn.ModuleList, new.blocks)[place] = nn.Identity()  # frees the block
            del block
        old.weights = self.weights


def _copy(new: list[Tensor], old: list[Tensor]) -> None:
    for theirs, mine in zip(new, old, strict=True):
        assert theirs.shape == mine.shape and theirs.dtype == mine.dtype, (
            "the config and formats are the same"
        )
        mine.copy_(theirs)


def _kv_scales(model: Qwen3Model) -> list[tuple[float, float]]:
    return [(block.att.key_scale, block.att.value_scale) for block in model.blocks]


def _codes_of(model: Qwen3Model) -> dict[str, dict[str, Codes]]:
    """The formats of the model's quantised weights."""
    return {name: module.codes for name, module in model.named_modules() if isinstance(module, Quantizable)}
