"""`EngineConfig`: everything one sharded engine needs to know, validated at construction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qwen3_dist.config import DTYPES, ModelConfig
from qwen3_dist.errors import ConfigError
from qwen3_dist.hf_overrides import HfOverrides
from qwen3_dist.kv_cache_dtype import kv_cache_dtype
from qwen3_dist.layout import Layout
from qwen3_dist.lora_adapters import LoraAdapters
from qwen3_dist.rank_env import parse_rank_env
from qwen3_dist.settings_reader import setting
from qwen3_dist.speculation import Speculation
from qwen3_dist.step_defaults import STEP_DEFAULTS
from qwen3_dist.weights_version import WeightsVersion

DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("checkpoint", "random")
QUANTIZATIONS = ("none", "int8", "fp8", "int4")
DISPATCHERS = ("auto", "all_gather", "all_to_all")
DISPATCH_DTYPES = ("auto", "fp8")
KV_CACHE_DTYPES = ("auto", "bfloat16", "fp8", "fp8_e4m3")
PERFORMANCE_MODES = ("interactivity", "throughput")
EXECUTORS = ("auto", "in_process", "processes", "ray")
PLACEMENTS = ("own", "current")
_CPU, _GPU = STEP_DEFAULTS["cpu"], STEP_DEFAULTS["cuda"]


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine: one model, one layout, one KV cache per dp group."""

    model: str = setting("", "checkpoint directory or hub id; empty means the bundled model")
    revision: str | None = setting(None, "branch, tag or commit of a hub id")
    weights: WeightsVersion = setting(
        WeightsVersion(),
        "directory on each node, or version=directory, of weights that are loaded in place of the model's own, whose "
        "architecture they share; in a service, a change of it alone starts no process",
    )
    load_format: str = setting(
        "checkpoint",
        "random: weights from a seed, for measuring; model then needs only a config.json",
        LOAD_FORMATS,
    )
    hf_overrides: HfOverrides = setting(
        HfOverrides(),
        "fields that take the place of those of config.json, for example YaRN for long contexts: "
        '{"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}',
    )
    layout: Layout = setting(Layout(), "parallel layout, for example tp=2,ep=2")
    device: str = setting("auto", "where ranks run; auto takes GPUs where there are some", DEVICES)
    dtype: str = setting("auto", "compute dtype; auto is the checkpoint's", ("auto", *DTYPES))
    quantize: str = setting(
        "none",
        "rounds weights while they load; int8: 8-bit integers with a scale per output; fp8: e4m3 with a scale per "
        "block of 128 x 128, as in Qwen's FP8 checkpoints; int4: 4-bit integers with a scale per group of 128 inputs",
        QUANTIZATIONS,
    )
    deterministic: bool = setting(
        False,
        "tokens and log-probabilities are the same bits for every layout and batch, on one kind of device; slower",
    )
    executor: str = setting(
        "auto",
        "how ranks are started; auto is in_process for one rank (in a service: processes), else ray",
        EXECUTORS,
    )
    placement: str = setting(
        "own",
        "placement group of ranks in Ray; current: the bundles after the first of the group that the engine's process "
        "is in, as a Serve replica's",
        PLACEMENTS,
    )
    moe_dispatch: str = setting(
        "auto",
        "how tokens reach experts on other ranks; auto is all_gather if the step is small or that is almost all ranks",
        DISPATCHERS,
    )
    dispatch_dtype: str = setting(
        "auto", "what tokens travel as to experts by all-to-all; auto is the activations'", DISPATCH_DTYPES
    )
    overlap_dispatch_from: int = setting(
        1024, "tokens a rank owns in a step from which their way to experts and the experts' work overlap"
    )
    redundant_experts: int = setting(0, "extra copies of experts in each MoE layer, for the hot ones")
    expert_load: str | None = setting(
        None, "JSON file of expert loads, by which experts are placed when loading; evenly if unset"
    )
    rebalance_experts_s: float | None = setting(
        None, "seconds between moves of experts to where the load since the last wants them; never if unset"
    )
    max_model_len: int | None = setting(None, "longest prompt plus output; the model's own limit if unset")
    block_size: int = setting(16, "tokens in one KV-cache block")
    num_blocks: int | None = setting(None, "KV-cache blocks per rank; sized from memory if unset")
    kv_cache_gib: float | None = setting(None, "KV-cache GiB per rank on CPU; sized from memory if unset")
    kv_cache_dtype: str = setting(
        "auto",
        "what the KV cache holds; fp8 or fp8_e4m3: 8-bit floats, for twice the tokens; bfloat16: needs that compute "
        "dtype; auto: fp8 if the checkpoint was made for it (kv_cache_scheme), else the compute dtype",
        KV_CACHE_DTYPES,
    )
    gpu_memory_utilization: float = setting(0.9, "share of a GPU's memory the engine may fill")
    max_num_seqs: int | None = setting(None, "most sequences in one step; by device and memory if unset")
    max_num_batched_tokens: int | None = setting(
        None, "most tokens in one step, longer prompts go in chunks; by device and performance_mode if unset"
    )
    performance_mode: str = setting(
        "interactivity",
        "interactivity: steps short enough that no token waits long for others' prompts "
        f"({_CPU.max_num_batched_tokens} tokens on CPU, {_GPU.max_num_batched_tokens} on GPU); throughput: larger "
        f"steps ({_CPU.throughput_tokens}, {_GPU.throughput_tokens})",
        PERFORMANCE_MODES,
    )
    prefix_caching: bool = setting(True, "keep finished prompts' KV blocks for prompts that begin alike")
    speculative: Speculation | None = setting(
        None, "guess tokens by what the text had before and check them together, for example ngram,k=4"
    )
    lora: LoraAdapters = setting(
        LoraAdapters(),
        "LoRA adapters in PEFT's format that requests choose by name; in a service, a change of them alone loads no "
        "model again; may be repeated",
    )
    overlap: bool = setting(True, "plan the next step while the ranks run this one")
    cpus_per_rank: float | None = setting(
        None, "CPUs reserved in Ray for each rank; by device and cluster if unset"
    )
    threads_per_rank: int | None = setting(
        None,
        "threads a CPU rank computes with, fewer leave cores to the server; its share of the cores if unset",
    )
    ranks_per_host: int | None = setting(
        None,
        "most CPU ranks that compute on a host, other engines' included, each with its share of the cores; by the "
        "most replicas in a service, else this engine's alone if unset",
    )
    cuda_graphs: bool = setting(True, "on a GPU, launch decode steps as CUDA graphs captured at start")
    share_gpus: bool = setting(
        False,
        "let several ranks share a GPU where there are fewer: for checks, as collectives then go over the host",
    )
    rank_env: Mapping[str, str] = setting(
        dict,
        "environment variables that every rank sets before it joins its group, for example "
        "NCCL_SOCKET_IFNAME=eth0; may be repeated",
        parse=parse_rank_env,
    )
    start_timeout_s: float = setting(
        600.0,
        "longest wait for ranks to be placed, and longest time without progress of a download or a load",
    )
    replacement_timeout_s: float = setting(
        30.0,
        "longest wait for another rank to start in place of a lost one; then the engine goes on with fewer dp groups",
    )
    step_timeout_s: float = setting(300.0, "longest wait for one step before the ranks count as dead")
    watchdog_timeout_s: float | None = setting(
        None,
        "a rank hangs, and counts as dead, if it answers nothing for about so long during a step, or if a step makes "
        "no progress for so long and for 20 times the longest recent step; 4 s on CPUs and 20 s on GPUs if unset",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", Layout.parse(self.layout))
        object.__setattr__(self, "hf_overrides", HfOverrides.parse(self.hf_overrides))
        object.__setattr__(self, "lora", LoraAdapters.parse(self.lora))
        object.__setattr__(self, "weights", WeightsVersion.parse(self.weights))
        object.__setattr__(self, "rank_env", parse_rank_env(self.rank_env))
        if self.speculative is not None:
            object.__setattr__(self, "speculative", Speculation.parse(self.speculative))
        for name in (
            "block_size",
            "overlap_dispatch_from",
            "start_timeout_s",
            "replacement_timeout_s",
            "step_timeout_s",
        ):
            _require(getattr(self, name) > 0, name, "positive", getattr(self, name))
        for name in (
            "max_model_len",
            "num_blocks",
            "kv_cache_gib",
            "cpus_per_rank",
            "threads_per_rank",
            "ranks_per_host",
            "max_num_seqs",
            "max_num_batched_tokens",
            "rebalance_experts_s",
            "watchdog_timeout_s",
        ):
            value = getattr(self, name)
            _require(value is None or value > 0, name, "positive", value)
        _require(
            0 < self.gpu_memory_utilization <= 1,
            "gpu_memory_utilization",
            "above 0 and at most 1",
            self.gpu_memory_utilization,
        )
        _require(self.redundant_experts >= 0, "redundant_experts", "0 or more", self.redundant_experts)
        _check_choices(self)
        if self.num_blocks is not None and self.kv_cache_gib is not None:
            raise ConfigError("num_blocks and kv_cache_gib both size the KV cache; keep one")
        if self.executor == "in_process" and self.layout.world > 1:
            raise ConfigError(
                f"executor in_process runs one rank and layout {self.layout} has more; use executor=processes"
            )
        if self.deterministic and self.dispatch_dtype == "fp8":
            raise ConfigError(
                "deterministic needs dispatch_dtype=auto: with fp8 a token is rounded only where it travels, which "
                "depends on the layout"
            )
        if self.placement == "current" and self.executor in ("processes", "in_process"):
            raise ConfigError(f"placement=current needs executor=ray, not {self.executor}")

    def compute_dtype(self, model: ModelConfig) -> str:
        """The name of `dtype`, or for "auto" of the checkpoint's."""
        return model.dtype if self.dtype == "auto" else self.dtype

    def cache_dtype(self, model: ModelConfig) -> str:
        """The dtype of the KV cache, as `kv_cache_dtype` returns it. Raises what that raises."""
        return kv_cache_dtype(self.kv_cache_dtype, self.compute_dtype(model), model.quantization)

    @property
    def has_random_weights(self) -> bool:
        """Whether weights are made, not read from files."""
        return self.load_format == "random" and not self.weights.path

    def watchdog_s(self, device: str) -> float:
        """`watchdog_timeout_s`, or its default for ranks on `device`: a GPU may compile a kernel during a step."""
        return self.watchdog_timeout_s or (4.0 if device == "cpu" else 20.0)


def runs_in_process(config: EngineConfig) -> bool:
    """Whether the engine's one rank lives in the engine's own process."""
    return config.executor == "in_process" or (config.executor == "auto" and config.layout.world == 1)


def _check_choices(settings: Any) -> None:
    for item in fields(settings):
        choices = item.metadata.get("choices")
        value = getattr(settings, item.name)
        if choices and value not in choices:
            raise ConfigError(f"{item.name} must be one of {', '.join(choices)}, not {value!r}")


def _require(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {expected}, not {value!r}")
