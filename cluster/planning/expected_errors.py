"""The error to expect of a prediction: that of measured points whose workload had no part in fitting the presets."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.hardware import FITTED, PRESETS, Cluster
from cluster.planning.products import weight_kind
from qwen3_dist.config import ModelConfig

_FEW = 10  # points, of which the mean error says little


@dataclass(frozen=True)
class ExpectedError:
    """Mean absolute relative errors of TTFT and ITL on `points` measured points of such a model on the device, on one
    node; None if there is no such point."""

    device: str
    model: str
    points: int
    ttft: float | None
    itl: float | None

    def __str__(self) -> str:
        if self.ttft is None or self.itl is None:
            return f"The error is not known: {self.model} on {self.device} was not measured."
        return (
            f"Error of the presets: {self.itl:.0%} in ITL and {self.ttft:.0%} in TTFT on {self.points} measured "
            f"points of {self.model} on one node of {self.device} (other engines, cross-validated)."
        )

    def as_json(self) -> dict[str, object]:
        """The object `expected_error` of `qwen3-dist plan --json` and `simulate --json`."""
        return {"points": self.points, "ttft": self.ttft, "itl": self.itl}


def error_name(device: str, kind: str, has_experts: bool) -> str:
    """The name of an error in `cluster/fitted.json`."""
    return f"{device} {kind} {'MoE' if has_experts else 'dense'}"


def expected_error(config: ModelConfig, cluster: Cluster, world: int) -> ExpectedError | None:
    """The error to expect for replicas of `world` ranks; None if the cluster's device is not as a preset has it.
    Replicas over several nodes were not measured."""
    name = cluster.device.name
    if name not in PRESETS or PRESETS[name].device != cluster.device:
        return None
    kind, has_experts = weight_kind(config), bool(config.num_experts)
    one_node = world <= cluster.devices_per_node
    found = FITTED["errors"].get(error_name(name, kind, has_experts)) if one_node else None
    model = (
        f"{'an MoE' if has_experts else 'a dense'} model in {kind}{'' if one_node else ' on several nodes'}"
    )
    if found is None or found["points"] < _FEW:
        return ExpectedError(name, model, 0, None, None)
    return ExpectedError(name, model, found["points"], found["ttft"], found["itl"])
