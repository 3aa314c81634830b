"""Time of a step of a layout: a roofline for each operation, plus collectives and overheads.

`docs/cost-model.md` derives every formula and names its source. Legend: T tokens of one dp group's step, S tokens
of all groups, N tokens a tp rank owns under all-to-all, D emb_dim, E experts, K experts per token, d head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from cluster.hardware import Cluster, WeightRates
from cluster.planning.collectives import groups_of
from cluster.planning.experts import EXPERT_EVENNESS, EXPERT_IMBALANCE, ExpertTimes
from cluster.planning.footprint import LayerSizes, Stage, stage_bytes, stages
from cluster.planning.memory import ITEM_BYTES, bytes_per_weight, kv_bytes_per_token, kv_item_bytes
from cluster.planning.products import MatmulTime, weight_kind, weight_rates
from qwen3_dist.config import ModelConfig
from qwen3_dist.layout import Layout
from qwen3_dist.model.step_memory import step_bytes
from qwen3_dist.parallel.expert_exchange import prefers_all_to_all


@dataclass(frozen=True)
class StepShape:
    """The work of one dp group in a step.

    `prefill_pairs` is the number of query-key pairs of the prompt chunks: n * m + n * (n + 1) / 2 for a chunk of n
    tokens after m others.
    """

    num_decodes: int
    decode_context_tokens: int
    prefill_tokens: int
    prefill_pairs: int
    num_samples: int


class StepLine(NamedTuple):
    """Seconds of a step that grow with the decodes' context and the query-key pairs of prompts."""

    constant_s: float
    per_context_s: float
    per_pair_s: float


class CostModel:
    """Step times of one replica of `layout`.

    expert_imbalance: load of the busiest ep rank over the mean, in (token, expert) pairs, on top of the random spread
    of even routing. expert_evenness: how alike experts are in how often they are chosen, as of `touched_share`.
    kv_bytes: bytes per cached number; by default those of the cache that the checkpoint was made for.
    adapters: the rank of LoRA adapters on all linear layers but experts (0: none), and how many of them a step uses.
    Products with quantised weights take as long as with plain ones unless the device says what they reach. Raises
    ParallelLayoutError if the layout does not fit the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        cluster: Cluster,
        expert_imbalance: float = EXPERT_IMBALANCE,
        *,
        expert_evenness: float = EXPERT_EVENNESS,
        kv_bytes: float | None = None,
        adapters: tuple[int, int] = (0, 1),
    ) -> None:
        layout.validate(config)
        self.config, self.layout, self.cluster = config, layout, cluster
        self.device = device = cluster.rank_device(layout.world)
        self.sizes = sizes = LayerSizes.of(config, layout)
        self.stages = stages(config, layout)
        self._distinct_stages = list(dict.fromkeys(self.stages))
        self._dense_layers = sum(stage.dense_layers for stage in self.stages)
        self._moe_layers = sum(stage.moe_layers for stage in self.stages)
        self._layers = self._dense_layers + self._moe_layers
        self._item = item = float(ITEM_BYTES[config.dtype])
        self._kv_item = kv_bytes or float(kv_item_bytes(config))
        groups = groups_of(cluster, layout.tp, layout.dp, layout.etp)
        self._tp, self._dp = groups["tp"], groups["dp"]
        self._matmul = MatmulTime(device, item)  # with plain weights
        given = weight_rates(device, weight_kind(config))
        stored = {} if given is None else bytes_per_weight(config)
        self._attention, self._dense, experts = (
            MatmulTime(device, stored[kind], given) if kind in stored else self._matmul
            for kind in ("attention", "dense", "experts")
        )
        self._lora_rank, self._adapters = adapters
        self._of_experts = given or WeightRates(expert_efficiency=device.expert_efficiency)
        self._read_s = 1 / (device.read_bytes_per_s * device.read_efficiency)  # per byte
        operations = 4 * sizes.heads * config.head_dim  # of a query-key pair: two products
        of_pairs = operations / (device.flops_per_s * device.attention_efficiency)
        kv_bytes = 2 * sizes.kv_groups * config.head_dim * self._kv_item
        kv_read = kv_bytes / (device.read_bytes_per_s * device.kv_read_efficiency)
        self._attention_per_layer = (
            max(of_pairs, kv_read),
            of_pairs,
        )  # seconds for a token of context, for a pair
        across = layout.world > cluster.devices_per_node
        self._stage_link = (cluster.between if across else cluster.inside).of("send")
        self._vocabulary = ceil(config.vocab_size / layout.tp) * config.emb_dim
        self._moe = ExpertTimes(
            config, layout, cluster, sizes=sizes, groups=groups, router=self._matmul, experts=experts,
            reached=self._of_experts, item=item, read_s=self._read_s,
            imbalance=expert_imbalance, evenness=expert_evenness,
        ) if config.num_experts else None  # fmt: skip

    def step_seconds(self, shape: StepShape) -> float:
        """Seconds of a step in which every dp group has this shape, until the same sequences can take the next step.

        Under pp the batch is split into up to pp micro-batches, which follow each other through the stages. The step
        takes the longer of the largest micro-batch through all stages, and all through the slowest stage.
        """
        micro = self._micro_batches(shape)
        _, stages = self._pass(shape, micro)
        through, _ = self._pass(self._largest(shape, micro)[0], 1)
        return max(through, *(micro * seconds for _, seconds in stages))

    def micro_batch_seconds(self, shape: StepShape) -> tuple[float, float]:
        """Seconds of `shape` as one micro-batch: through all stages, and until the next micro-batch can start."""
        through, stages = self._pass(shape, 1)
        return through, max(seconds for _, seconds in stages)

    def step_lines(self, num_decodes: int, prefill_tokens: int, num_samples: int) -> list[StepLine]:
        """Lines of which the highest is `step_seconds` of a step with these numbers of tokens."""
        shape = StepShape(num_decodes, 0, prefill_tokens, 0, num_samples)
        micro = self._micro_batches(shape)
        _, stages = self._pass(shape, micro)
        largest, share = self._largest(shape, micro)
        through, _ = self._pass(largest, 1)
        of_context, of_pair = self._attention_per_layer
        first = StepLine(through, self._layers * of_context / micro, self._layers * of_pair * share)
        passes = ((layers, micro * seconds) for layers, seconds in stages)
        return [
            first,
            *(StepLine(seconds, layers * of_context, layers * of_pair) for layers, seconds in passes),
        ]

    def step_parts(self, shape: StepShape) -> dict[str, float]:
        """`step_seconds` by operation. `pipeline` is the time that micro-batches wait for each other."""
        micro = self._micro_batches(shape)
        attention, dense, experts, ends = self._layer_parts(shape, micro)
        parts: dict[str, float] = {}
        for stage in self.stages:
            counted = ((stage.layers, attention), (stage.dense_layers, dense), (stage.moe_layers, experts))
            for count, operations in counted:
                for name, seconds in operations.items():
                    parts[name] = parts.get(name, 0.0) + count * seconds
            for name, seconds in ends.items():
                if self._runs_on(stage, name):
                    parts[name] = parts.get(name, 0.0) + seconds
        parts["overhead"] = self._overhead(shape, micro)
        parts["pipeline"] = self.step_seconds(shape) - sum(parts.values())
        return {name: seconds for name, seconds in parts.items() if seconds > 1e-12}

    def weights_bytes(self) -> int:
        """Bytes of weights on the fullest rank."""
        return int(
            max(
                stage_bytes(self.config, self.layout, self.sizes, stage, self._item)
                for stage in self._distinct_stages
            )
        )

    def activation_bytes(self, max_num_batched_tokens: int, max_num_seqs: int) -> int:
        """Bytes of activations and buffers of the largest step on one rank."""
        config, layout = self.config, self.layout
        tokens = max_num_batched_tokens * layout.dp
        by_all_to_all = prefers_all_to_all(layout, config, tokens, device=self.cluster.device_kind)
        widens = config.quantization is not None and config.quantization.has_int8
        sizes = (max_num_batched_tokens, max_num_seqs)
        return step_bytes(config, layout, *sizes, self._item, by_all_to_all, widens)

    def kv_bytes_per_token(self) -> float:
        """KV-cache bytes per token on a rank of the stage with the most layers."""
        ranks = range(0, self.layout.world, self.layout.stage_size)
        return max(kv_bytes_per_token(self.config, self.layout, rank, 1) for rank in ranks) * self._kv_item

    def kv_capacity_tokens(self, max_num_batched_tokens: int, max_num_seqs: int) -> int:
        """Tokens that fit into the KV cache of one dp group; 0 or less if the weights do not fit."""
        usable = self.device.memory_bytes * self.device.memory_utilization
        left = usable - self.weights_bytes() - self.activation_bytes(max_num_batched_tokens, max_num_seqs)
        return int(left / self.kv_bytes_per_token())

    def _micro_batches(self, shape: StepShape) -> int:
        """Number of micro-batches: one per sequence, since the engine does not split a chunk, and at most pp."""
        prompts = max(shape.num_samples - shape.num_decodes, 1 if shape.prefill_tokens else 0)
        return min(self.layout.pp, max(1, shape.num_decodes + prompts))

    def _largest(self, shape: StepShape, micro: int) -> tuple[StepShape, float]:
        """The micro-batch with the most prompts, which are not split, and its share of the prompts."""
        if micro == 1:
            return shape, 1.0
        prompts = max(1, shape.num_samples - shape.num_decodes)
        share = ceil(prompts / micro) / prompts
        return StepShape(
            ceil(shape.num_decodes / micro),
            ceil(shape.decode_context_tokens / micro),
            ceil(shape.prefill_tokens * share),
            ceil(shape.prefill_pairs * share),
            ceil(shape.num_samples / micro),
        ), share

    def _overhead(self, shape: StepShape, micro: int) -> float:
        """Seconds of scheduling and launching a micro-batch, outside its layers."""
        cluster = self.cluster
        tokens = shape.num_decodes + shape.prefill_tokens
        sequences = max(shape.num_decodes, shape.num_samples)
        seconds = (
            cluster.step_overhead_s
            + (cluster.sequence_overhead_s * sequences + cluster.token_overhead_s * tokens) / micro
        )
        if self.layout.world > 1:
            seconds += cluster.ranks_overhead_s
        if self.config.num_experts:
            seconds += self._dp.all_gather(0.0)  # dp groups synchronise on the step
        return seconds

    def _pass(self, shape: StepShape, micro: int) -> tuple[float, list[tuple[int, float]]]:
        """Seconds of one micro-batch through all stages; layers and seconds of each stage that differs from others,
        and of the engine, which has no layers."""
        *layers, ends = self._layer_parts(shape, micro)
        attention, dense, experts = (sum(part.values()) for part in layers)
        embedding, send, head = ends["embedding"], ends["stage send"], ends["head"]
        overhead = self._overhead(shape, micro)
        total = self._layers * attention + self._dense_layers * dense + self._moe_layers * experts
        total += embedding + head + (self.layout.pp - 1) * send + overhead
        if self.layout.pp == 1:
            return total, [(self._layers, total)]
        stages = [(0, overhead)]
        for stage in self._distinct_stages:
            seconds = stage.layers * attention + stage.dense_layers * dense + stage.moe_layers * experts
            seconds += (embedding if stage.first else 0.0) + (head if stage.last else send)
            stages.append((stage.layers, seconds))
        return total, stages

    def _runs_on(self, stage: Stage, name: str) -> bool:
        """Whether `stage` runs the operation `name`: embedding, stage send or head."""
        if name == "stage send":
            return not stage.last
        return stage.first if name == "embedding" else stage.last

    def _layer_parts(
        self, shape: StepShape, micro: int
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float], dict[str, float]]:
        """Seconds by operation of a micro-batch: in one layer's attention, in a dense FFN, in an MoE layer's experts,
        and outside the layers (embedding, stage send, head)."""
        config, sizes, item = self.config, self.sizes, self._item
        tokens = (shape.num_decodes + shape.prefill_tokens) / micro
        dim = config.emb_dim
        hidden = tokens * dim * item
        decode_pairs, prefill_pairs = shape.decode_context_tokens / micro, shape.prefill_pairs / micro
        of_context, of_pairs = self._attention_per_layer
        attention = {
            "attention projections": self._attention.seconds(tokens, sizes.attention),
            "attention of decodes": decode_pairs * of_context,
            "attention of prompts": prefill_pairs * of_pairs,
            "norms, rope, residuals": self._read_s
            * tokens
            * item
            * (10 * dim + 2 * (sizes.heads + 2 * sizes.kv_groups) * config.head_dim),
            "layer overhead": self.cluster.layer_overhead_s
            + (self.cluster.prompt_layer_overhead_s if shape.prefill_tokens else 0.0),
        }
        if self._lora_rank:
            outer = 4 * dim + 2 * (sizes.heads + sizes.kv_groups) * config.head_dim  # of the four projections
            attention["LoRA"] = self._lora_seconds(tokens, outer)
        all_reduce = self._tp.all_reduce(hidden)
        dense: dict[str, float] = {}
        if self._dense_layers:
            dense = {
                "dense FFN": self._dense.seconds(tokens, sizes.dense)
                + self._read_s * tokens * item * 3 * sizes.dense_columns,
                "tp all-reduce": 2 * all_reduce,
            }
            if self._lora_rank:
                dense["LoRA"] = self._lora_seconds(tokens, 3 * (dim + sizes.dense_columns))
        experts: dict[str, float] = {}
        if self._moe is not None:
            experts = self._moe.parts(tokens, hidden, all_reduce)
            experts["layer overhead"] = self._of_experts.expert_layer_overhead_s
        samples = shape.num_samples / micro
        ends = {
            "embedding": self._tp.all_reduce(hidden),
            "stage send": self._stage_link.latency_s
            + hidden / (self._stage_link.bytes_per_s * self._stage_link.efficiency),
            "head": self._matmul.seconds(samples, self._vocabulary)
            + self._tp.all_gather(samples * config.vocab_size * item),
        }
        return attention, dense, experts, ends

    def _lora_seconds(self, tokens: float, outer: int) -> float:
        """Seconds of the adapters' products in one layer; `outer`: inputs and outputs of its linear layers."""
        return self._adapters * self._matmul.seconds(tokens / self._adapters, self._lora_rank * outer)
