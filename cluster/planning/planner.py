"""Compares all layouts on a cluster for one workload, and ranks them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil

from cluster.hardware import Cluster
from cluster.planning.clients import Latencies, closed_loop, seen_steps, spread_out
from cluster.planning.cost_model import CostModel
from cluster.planning.experts import EXPERT_IMBALANCE
from cluster.planning.memory import kv_item_bytes
from cluster.planning.ranking import ranked
from cluster.planning.steady import SeenSteps, SteadySteps
from cluster.planning.walk import StepRules, Workload, prompts_at_once
from qwen3_dist.config import ModelConfig
from qwen3_dist.errors import ConfigError
from qwen3_dist.layout import Layout, divisors, valid_layouts
from qwen3_dist.step_defaults import STEP_DEFAULTS

_LARGEST_REPLICA = 1024  # ranks; larger ones are planned only if they are asked for
_MOST_WALKED = 1024  # clients of a replica; for more, requests are taken to come one by one


@dataclass(frozen=True)
class PlanRequest:
    """The workload to plan for: `concurrency` equal requests in flight in the whole cluster.

    ttft_ms and itl_ms are limits of the mean TTFT and ITL that the best layout must meet. prefix_hits: share of the
    prompts' tokens that the prefix cache holds. drafted: tokens that speculation drafts for a sequence in a step;
    acceptance: share of them that is accepted. lora_rank: of the `adapters` adapters that a step uses; 0: none.
    layout: the only one to plan for; None: all.
    """

    input_len: int
    output_len: int
    concurrency: int
    ttft_ms: float | None = None
    itl_ms: float | None = None
    max_num_batched_tokens: int = STEP_DEFAULTS["cuda"].max_num_batched_tokens
    expert_imbalance: float = EXPERT_IMBALANCE
    kv_cache_dtype: str = "auto"
    prefix_hits: float = 0.0
    drafted: int = 0
    acceptance: float = 0.0
    lora_rank: int = 0
    adapters: int = 1
    layout: Layout | None = None

    def __post_init__(self) -> None:
        for name in ("prefix_hits", "acceptance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share from 0 to 1, not {getattr(self, name):g}")
        if self.drafted < 0:
            raise ConfigError(f"drafted must not be negative, not {self.drafted}")
        if self.lora_rank < 0 or self.adapters < 1:
            raise ConfigError("lora_rank must not be negative, and adapters must be 1 or more")
        if self.acceptance and not self.drafted:
            raise ConfigError(
                "acceptance is of drafted tokens; give the number that a step drafts, 1 or more"
            )
        for name in ("input_len", "output_len", "concurrency", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("ttft_ms", "itl_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, not {value:g}")

    @property
    def length(self) -> int:
        """Tokens of a finished sequence: prompt and output."""
        return self.input_len + self.output_len

    @property
    def workload(self) -> Workload:
        """One of its requests. At least a token of each prompt is computed."""
        cached = min(int(self.prefix_hits * self.input_len), self.input_len - 1)
        return Workload(self.input_len, self.output_len, cached, self.drafted, self.acceptance * self.drafted)


@dataclass(frozen=True)
class PlannedLayout:
    """The predictions for one layout. Rates are for the whole cluster; None if the layout does not fit.

    reason: why it does not fit. bytes_per_rank: memory of the fullest rank, with the KV cache that this workload uses.
    max_batch: sequences of this workload that fit into the KV cache of one replica. ttft_ms, itl_ms: means over all
    requests of clients that begin together (`closed_loop`); ttft_percentiles_ms: p50, p90 and p99.
    """

    layout: Layout
    replicas: int
    concurrency: int
    fits: bool
    reason: str
    bytes_per_rank: dict[str, int] = field(default_factory=dict)
    max_batch: int = 0
    ttft_ms: float | None = None
    itl_ms: float | None = None
    tokens_per_s: float | None = None
    tokens_per_s_per_gpu: float | None = None
    ttft_percentiles_ms: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s_per_user(self) -> float:
        """Tokens per second of one request while it decodes."""
        return 1e3 / self.itl_ms if self.itl_ms else 0.0

    def meets_limits(self, request: PlanRequest) -> bool:
        """Whether it fits and meets both limits."""
        return self.fits and _within(self.ttft_ms, request.ttft_ms) and _within(self.itl_ms, request.itl_ms)

    def as_json(self) -> dict[str, object]:
        """The object that `qwen3-dist plan --json` prints."""
        return {
            "layout": str(self.layout),
            "fits": self.fits,
            "reason": self.reason,
            "bytes_per_rank": self.bytes_per_rank,
            "max_batch": self.max_batch,
            "ttft_ms": _rounded(self.ttft_ms),
            **{f"ttft_{name}_ms": round(value, 3) for name, value in self.ttft_percentiles_ms.items()},
            "itl_ms": _rounded(self.itl_ms),
            "tokens_per_s": _rounded(self.tokens_per_s),
            "tokens_per_s_per_gpu": _rounded(self.tokens_per_s_per_gpu),
        }


def plan(config: ModelConfig, cluster: Cluster, request: PlanRequest) -> list[PlannedLayout]:
    """All valid layouts of all worlds that divide the cluster, or the one of the request, best first.

    Layouts that meet the limits come first, then those that fit but do not meet them, then those that do not fit; each
    by throughput, as `ranked` has it. Raises ConfigError if the sequences are longer than the model's context.
    """
    planned = [
        predict(config, layout, cluster, request) for layout in candidates(config, cluster, request.layout)
    ]
    return ranked(
        planned,
        lambda one: one.layout,
        lambda one: one.tokens_per_s_per_gpu or 0.0,
        lambda one: (not one.fits, not one.meets_limits(request)),
    )


def candidates(config: ModelConfig, cluster: Cluster, only: Layout | None = None) -> list[Layout]:
    """All valid layouts of all worlds up to 1,024 that divide the cluster, or `only` that one. Raises
    ParallelLayoutError if it cannot split the model, and ConfigError if it has no place in the cluster."""
    if only is None:
        worlds = [world for world in divisors(cluster.num_devices) if world <= _LARGEST_REPLICA]
        return [one for world in worlds for one in valid_layouts(config, world)]
    only.validate(config)
    if cluster.num_devices % only.world:
        raise ConfigError(
            f"layout {only} has {only.world} ranks, which do not divide the {cluster.num_devices} devices of the "
            "cluster; change --layout or the number of devices"
        )
    return [only]


def at_all_loads(config: ModelConfig, cluster: Cluster, request: PlanRequest) -> list[PlannedLayout]:
    """Every layout at concurrencies 1, 2, 4, ... up to four times the requested one, and at the requested one."""
    doublings = (4 * request.concurrency).bit_length()
    loads = sorted({request.concurrency, *(2**power for power in range(doublings))})
    return [one for load in loads for one in plan(config, cluster, replace(request, concurrency=load))]


def pareto_frontier(planned: list[PlannedLayout]) -> list[PlannedLayout]:
    """The fitting layouts that no other beats in both throughput per GPU and speed per user."""
    frontier: list[PlannedLayout] = []
    fitting = [one for one in planned if one.fits and one.itl_ms]
    for one in sorted(fitting, key=lambda o: (-o.tokens_per_s_per_user, -(o.tokens_per_s_per_gpu or 0.0))):
        if not frontier or (one.tokens_per_s_per_gpu or 0) > (frontier[-1].tokens_per_s_per_gpu or 0):
            frontier.append(one)
    return frontier


def predict(
    config: ModelConfig, layout: Layout, cluster: Cluster, request: PlanRequest, *, spread: bool = False
) -> PlannedLayout:
    """The predictions for `layout` on as many replicas as `cluster` holds, which share the load.

    Clients begin together, or if `spread`, requests come one by one at random.
    """
    if request.length > config.context_length:
        raise ConfigError(
            f"{request.input_len} + {request.output_len} tokens exceed the model's context of "
            f"{config.context_length}; lower --input-len or --output-len"
        )
    replicas = cluster.replicas(layout.world)
    unfit = PlannedLayout(layout, replicas, request.concurrency, False, "")
    node = cluster.devices_per_node
    if layout.tp > 1 and node % layout.tp:
        return replace(unfit, reason=f"tp={layout.tp} does not fit into nodes of {node} devices")
    replica = replica_load(config, layout, cluster, request, spread=spread)
    model, capacity, sequences = replica.model, replica.capacity_tokens, replica.sequences
    weights = model.weights_bytes()
    activations = model.activation_bytes(request.max_num_batched_tokens, sequences)
    used = {"weights": weights, "kv": 0, "activations": activations}
    fitting = max(0, capacity) // request.length
    if fitting < 1:
        return replace(unfit, reason=_too_large(model, used, capacity, request), bytes_per_rank=used)
    used["kv"] = int(min(sequences, fitting) * request.length * model.kv_bytes_per_token())
    seen = replica.latencies()
    rate = seen.requests_per_s * request.output_len * request.concurrency / replica.clients
    return PlannedLayout(
        layout,
        replicas,
        request.concurrency,
        True,
        "",
        used,
        fitting * layout.dp,
        1e3 * seen.ttft_s,
        1e3 * seen.itl_s if request.output_len > 1 else None,
        rate,
        rate / cluster.num_devices,
        {} if replica.spread else _percentiles_ms(seen),
    )


@dataclass(frozen=True)
class ReplicaLoad:
    """The load of one replica: `clients` requests in flight, of which a dp group runs `sequences` at a time if the
    `capacity_tokens` of its cache hold them. spread: requests come one by one at random; else clients begin together.
    """

    model: CostModel
    rules: StepRules
    load: Workload
    clients: int
    sequences: int
    capacity_tokens: int
    spread: bool

    @property
    def _running(self) -> int:
        held = self.capacity_tokens // (self.load.input_len + self.load.output_len)
        return min(self.clients, min(self.sequences, held) * self.model.layout.dp)

    def latencies(self) -> Latencies:
        """What its clients see."""
        if self.spread:
            return spread_out(self.model, self.rules, self.load, self._running, self.clients)
        return closed_loop(self.model, self.rules, self.load, self.clients)

    def steps(self) -> SeenSteps:
        """The steps in which its sequences decode."""
        if self.spread:
            return SteadySteps(self.model, self.rules, self.load, self._running).seen()
        return seen_steps(self.model, self.rules, self.load, self.clients)


def replica_load(
    config: ModelConfig, layout: Layout, cluster: Cluster, request: PlanRequest, *, spread: bool = False
) -> ReplicaLoad:
    """What each replica of a layout has to do. Replicas share the load."""
    model = cost_model(config, layout, cluster, request)
    replicas, dp, most_tokens = cluster.replicas(layout.world), layout.dp, request.max_num_batched_tokens
    sequences = min(ceil(request.concurrency / (replicas * dp)), most_tokens)
    capacity = model.kv_capacity_tokens(most_tokens, sequences)
    load, clients = request.workload, ceil(request.concurrency / replicas)
    chunks = ceil((load.input_len - load.cached_len) / max(1, most_tokens - sequences))
    most = prompts_at_once(clients * (chunks if dp > 1 else 1), 1 + load.decode_steps)
    rules = StepRules(most_tokens, sequences * dp, capacity * dp, most, dp)
    return ReplicaLoad(model, rules, load, clients, sequences, capacity, spread or clients > _MOST_WALKED)


def cost_model(config: ModelConfig, layout: Layout, cluster: Cluster, request: PlanRequest) -> CostModel:
    """The cost model that `predict` uses for `request`."""
    kept = kv_item_bytes(config, request.kv_cache_dtype)
    adapters = (request.lora_rank, request.adapters)
    return CostModel(config, layout, cluster, request.expert_imbalance, kv_bytes=kept, adapters=adapters)


def _percentiles_ms(seen: Latencies) -> dict[str, float]:
    return {"p50": 1e3 * seen.ttft_p50_s, "p90": 1e3 * seen.ttft_p90_s, "p99": 1e3 * seen.ttft_p99_s}


def _too_large(model: CostModel, used: dict[str, int], capacity: int, request: PlanRequest) -> str:
    usable = model.device.memory_bytes * model.device.memory_utilization
    if capacity <= 0:
        return (
            f"weights of {used['weights'] / 1e9:.1f} GB and activations of {used['activations'] / 1e9:.1f} GB "
            f"exceed the {usable / 1e9:.1f} GB of a rank"
        )
    return f"the cache of a dp group holds {capacity} tokens and one request has {request.length}"


def _within(value: float | None, limit: float | None) -> bool:
    return limit is None or value is None or value <= limit


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
