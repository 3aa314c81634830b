"""What config.json says about quantised weights, and what of it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import CheckpointError
from qwen3_dist.quantization import FP8, INT4, INT8, Grid, Packing, Stored, WeightFormat
from qwen3_dist.quantization_config import read_quantization

AWQ: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
QWEN: dict[str, Any] = {  # that of Qwen3-30B-A3B-FP8, shortened
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.gate", "model.layers.1.self_attn.o_proj"],
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
SCALE = Stored(("weight_scale",))
BLOCKS = WeightFormat(FP8, (128, 128), Stored(("weight_scale_inv", "weight_scale")))


def compressed(**weights: Any) -> dict[str, Any]:
    """A config of llm-compressor with one group."""
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", **weights},
        "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def test_a_checkpoint_without_quantisation_has_none() -> None:
    assert read_quantization({}) is None
    assert read_quantization({"quantization_config": None, "compression_config": {}}) is None


def test_modules_are_left_alone_by_whole_names() -> None:
    read = read_quantization({"quantization_config": QWEN})
    assert read is not None and read.of("model.layers.0.self_attn.o_proj") == BLOCKS
    assert read.of("model.layers.1.self_attn.o_proj") is None
    assert read.of("lm_head") is None
    # "mlp.gate" is not "mlp.gate_proj", and layer 1 is not layer 11
    assert read.of("model.layers.1.mlp.gate_proj") == read.of("model.layers.11.mlp.gate") == BLOCKS
    ignoring = {**QWEN, "modules_to_not_convert": None, "ignored_layers": ["model.layers.3", "q_proj"]}
    read = read_quantization({"quantization_config": ignoring})
    assert read is not None and read.of("model.layers.3.mlp.experts.7.up_proj") is None
    assert read.of("model.layers.4.self_attn.q_proj") is None
    assert read.of("model.layers.30.mlp.experts.7.up_proj") == BLOCKS


def test_groups_have_their_own_formats_and_names_come_before_the_class() -> None:
    config = compressed()
    rest = config["config_groups"]["group_0"]
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    config["config_groups"]["group_1"] = {"targets": [r"re:.*mlp\.down_proj$"], "weights": eight}
    config["ignore"] += ["re:.*layers.0\\..*"]
    rest["weights"] = {**rest["weights"], "strategy": "block", "block_structure": [64, 32]}
    read = read_quantization({"compression_config": config})
    assert read is not None
    assert read.of("model.layers.1.mlp.up_proj") == WeightFormat(FP8, (64, 32), SCALE)
    assert read.of("model.layers.1.mlp.down_proj") == WeightFormat(INT8, None, SCALE)
    assert read.of("model.layers.0.mlp.down_proj") is None
    assert read.describe() == "compressed-tensors: fp8 (e4m3) by blocks of 64 x 32, int8 by outputs"


def test_gptq_may_have_settings_for_some_modules() -> None:
    dynamic = {r"-:.*layers\.0\..*": {}, r"+:.*down_proj": {"bits": 8, "group_size": -1}}
    read = read_quantization({"quantization_config": {**GPTQ, "desc_act": True, "dynamic": dynamic}})
    assert read is not None and read.of("model.layers.0.mlp.up_proj") is None
    of_some, of_rest = read.of("model.layers.1.mlp.down_proj"), read.of("model.layers.1.mlp.up_proj")
    assert of_some is not None and (of_some.codes, of_some.block, of_some.order) == (INT8, None, None)
    assert of_rest is not None and (of_rest.codes, of_rest.block) == (INT4, (1, 128)) and of_rest.order


def test_older_spellings_say_the_same() -> None:
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}
    assert read_quantization({"quantization_config": old}) == read_quantization({"quantization_config": AWQ})
    blocks = [compressed(strategy="block", block_structure=each) for each in ("128x128", [128, 128])]
    one, other = (read_quantization({"quantization_config": each}) for each in blocks)
    assert one == other


def test_zeros_are_read_as_their_format_has_them() -> None:
    changed = (({}, 0, 0x11111111), ({"checkpoint_format": "gptq_v2"}, 0, 0), ({"bits": 8}, 128, 0x01010101))
    for changes, plus, ones in changed:
        read = read_quantization({"quantization_config": {**GPTQ, "sym": False, **changes}})
        stored = read.of("model.layers.0.mlp.up_proj") if read else None
        assert stored is not None and stored.zero is not None
        bits: int = changes.get("bits", 4)  # type: ignore[attr-defined]
        assert stored.zero.packing == Packing(bits, axis=0, transposed=True, plus=plus, word_plus=ones)
        assert stored.zero.packing.shape((96, 16)) == (16, 96 * stored.zero.packing.bits // 32)


def test_a_part_has_the_blocks_that_cover_it() -> None:
    # 30B-A3B's 768 columns in 8 parts of 96: the second begins in the first block and ends in the second
    assert BLOCKS.grid(96, 0, 2048) == Grid(128, 128, 96, 0)
    assert BLOCKS.grid(96, 0, 2048).shape(96, 2048) == (2, 16)
    assert BLOCKS.grid(288, 0, 2048).shape(96, 2048) == (1, 16)  # from 32 to 128 of block 2
    assert WeightFormat(FP8, None, SCALE).grid(96, 192, 2048).shape(5, 96) == (5, 1)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "'bitsandbytes' is not supported; supported are fp8",
        ),
        ({"quantization_config": {"quant_method": "gguf"}}, "quantisation 'gguf'"),
        ({"quantization_config": {"quant_method": "exl2", "bits": 4}}, "quantisation 'exl2'"),
        ({"quantization_config": {"quant_method": "awq"}}, "bits=None is not supported; 4 bits are"),
        ({"quantization_config": {**AWQ, "version": "gemv"}}, "version='gemv' is not supported; gemm is"),
        ({"quantization_config": {**AWQ, "zero_point": False}}, "zero_point=False is not supported"),
        (
            {"quantization_config": {**AWQ, "lm_head": True}},
            "lm_head=True is not supported; a head that is not",
        ),
        ({"quantization_config": {**GPTQ, "bits": 3}}, "bits=3 is not supported; 4 and 8 bits are"),
        (
            {"quantization_config": {**GPTQ, "checkpoint_format": "marlin"}},
            "checkpoint_format='marlin' is not",
        ),
        (
            {"quantization_config": {**GPTQ, "group_size": 0}},
            "group_size=0 is neither a positive integer nor -1",
        ),
        ({"quantization_config": {**GPTQ, "dynamic": {"+:(": {}}}}, "no regular expression"),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "MXFP8"}},
            "quant_algo='MXFP8' is not",
        ),
        (
            {
                "quantization_config": {
                    **compressed(num_bits=4, group_size=8),
                    "format": "nvfp4-pack-quantized",
                }
            },
            "not symmetric 4-bit floats by groups of 16",
        ),
        (
            {"quantization_config": {**compressed(num_bits=3, type="int"), "format": "pack-quantized"}},
            "packed 3-bit weights of type 'int'",
        ),
        (
            {
                "quantization_config": {
                    **compressed(num_bits=4, type="int", strategy="group"),
                    "format": "pack-quantized",
                }
            },
            "group_size=None where a positive integer",
        ),
        ({"quantization_config": {"bits": 4}}, "quantisation None"),
        ({"quantization_config": "fp8"}, "must be a JSON object"),
        ({"quantization_config": QWEN, "compression_config": compressed()}, "disagree"),
        ({"quantization_config": {**QWEN, "fmt": "e5m2"}}, "fmt='e5m2' is not supported; e4m3 is"),
        (
            {"quantization_config": {**QWEN, "weight_block_size": [128]}},
            "weight_block_size is .128. where two",
        ),
        ({"quantization_config": {**QWEN, "weight_block_size": [0, 128]}}, "two positive integers"),
        ({"quantization_config": {**QWEN, "expert_dtype": "fp4"}}, "expert_dtype='fp4' is not supported"),
        ({"quantization_config": {**QWEN, "secret": 3}}, "secret=3 is not understood"),
        ({"quantization_config": {**QWEN, "ignored_layers": "lm_head"}}, "a list of names"),
        ({"quantization_config": compressed(num_bits=4, type="int")}, "4-bit weights of type 'int'"),
        ({"quantization_config": compressed(type="int", symmetric=False)}, "zero points"),
        ({"quantization_config": compressed(strategy="group")}, "strategy 'group'"),
        ({"quantization_config": compressed(strategy="block")}, "without block_structure"),
        (
            {"quantization_config": {**compressed(), "format": "pack-quantized"}},
            "packed 8-bit weights of type 'float'",
        ),
        ({"quantization_config": {**compressed(), "format": "marlin-24"}}, "format='marlin-24'"),
        ({"quantization_config": {**compressed(), "config_groups": {}}}, "config_groups is {}"),
        ({"quantization_config": {**compressed(), "ignore": ["re:("]}}, "no regular expression"),
        (
            {"quantization_config": {**compressed(), "sparsity_config": {"format": "sparse"}}},
            "sparsity_config",
        ),
        ({"quantization_config": {**compressed(), "sparsity_config": "dense"}}, "sparsity_config"),
        ({"quantization_config": {**GPTQ, "dynamic": {"+:x": 5}}}, "dynamic has 5 for '.:x' where an object"),
    ],
)
def test_what_is_not_supported_is_refused(raw: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        ModelConfig.from_dict({"model_type": "qwen3", **raw})


def test_a_file_of_modelopt_may_tell_of_the_kv_cache_alone_and_is_named_where_it_is_wrong(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    file = tmp_path / "hf_quant_config.json"
    file.write_text('{"quantization": {"quant_algo": null, "kv_cache_quant_algo": "FP8"}}')
    assert ModelConfig.from_directory(tmp_path).quantization is None
    file.write_text('{"quantization": {"quant_algo": "W4A8"}}')
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: quant_algo='W4A8' is not supported"):
        ModelConfig.from_directory(tmp_path)
