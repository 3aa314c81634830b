"""The error to expect of a prediction: that of measured points whose workload had no part in fitting the presets."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.hardware import FITTED, PRESETS, Cluster
from cluster.planning.products import weight_kind
from qwen3_dist.config import ModelConfig


@dataclass(frozen=True)
class ExpectedError:
    """Mean absolute relative errors of TTFT and ITL on `points` measured points of the device and the kind of weights;
    None if no point was at hand."""

    device: str
    weights: str
    points: int
    ttft: float | None
    itl: float | None

    def __str__(self) -> str:
        measured = f"of {self.device} with {self.weights} weights"
        if self.ttft is None or self.itl is None:
            return f"The error is not known: no measured point {measured} was at hand."
        return (
            f"Expect errors of {self.itl:.0%} in ITL and {self.ttft:.0%} in TTFT, as on {self.points} measured points "
            f"{measured} (other engines, cross-validated)."
        )

    def as_json(self) -> dict[str, object]:
        """The object `expected_error` of `qwen3-dist plan --json` and `simulate --json`."""
        return {"points": self.points, "ttft": self.ttft, "itl": self.itl}


def expected_error(config: ModelConfig, cluster: Cluster) -> ExpectedError | None:
    """The error to expect for `config` on `cluster`; None if its device is not as a preset has it."""
    name = cluster.device.name
    if name not in PRESETS or PRESETS[name].device != cluster.device:
        return None
    kind = weight_kind(config)
    found = FITTED["errors"].get(f"{name} {kind}", {"points": 0, "ttft": None, "itl": None})
    return ExpectedError(name, kind, found["points"], found["ttft"], found["itl"])
