"""Results of checks and stages, and the verdict that is printed at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PASSED, FAILED, SKIPPED, LEFT_OUT = "passed", "failed", "skipped", "left out"
UNFINISHED = "unfinished"  # a stage without failures that had no time for all of its checks
_MAX_LISTED = 6  # failed checks of a stage that the verdict lists


@dataclass(frozen=True)
class Check:
    """Result of one check. `outcome` is passed, failed, skipped or left out; `why` is the reason unless it passed."""

    name: str
    outcome: str
    seconds: float = 0.0
    why: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """For example `passed    1.3 s  dense, tp=2: equal_sequences 4 of 4`."""
        said = self.why or ", ".join(f"{key} {_short(value)}" for key, value in self.figures.items())
        return f"  {self.outcome:8} {self.seconds:6.1f} s  {self.name}{': ' if said else ''}{said}"


@dataclass(frozen=True)
class StageReport:
    """Result of one stage. `advice` says what to do if it failed, `ended` why it ended before its last check.
    `stderr` has the end of a failed stage's stderr; if the stage hung, the stacks of its threads."""

    name: str
    advice: str
    seconds: float
    limit_s: float
    checks: tuple[Check, ...] = ()
    ended: str = ""
    stderr: str = ""

    @property
    def status(self) -> str:
        outcomes = {check.outcome for check in self.checks}
        if self.ended or FAILED in outcomes:
            return FAILED
        if LEFT_OUT in outcomes:
            return UNFINISHED
        return PASSED if PASSED in outcomes else SKIPPED

    @property
    def summary(self) -> str:
        """For example `11 passed, 1 failed in 84 of 150 s`."""
        counts = Counter(check.outcome for check in self.checks)
        parts = [f"{counts[o]} {o}" for o in (PASSED, FAILED, SKIPPED, LEFT_OUT) if counts[o]]
        return f"{', '.join(parts) or 'no check ran'} in {self.seconds:.0f} of {self.limit_s:.0f} s"

    def as_json(self) -> dict[str, Any]:
        said = {**asdict(self), "status": self.status}
        return {key: value for key, value in said.items() if value not in ("", None)}


def verdict(about: str, reports: Sequence[StageReport], written_to: str = "", on_gpu: bool = True) -> str:
    """The status of each stage with reasons and advice, and the overall result. `written_to` is the JSON file, if
    any."""
    lines = [f"VERDICT for {about}"]
    for report in reports:
        lines.append(f"{report.name:8} {report.status:10} {report.summary}")
        lines += [f"    {line}" for line in _reasons(report)]
        if report.status == FAILED:
            lines.append(f"    what to do: {report.advice}")
        if report.status == UNFINISHED:
            lines.append(
                f"    what to do: run --stages {report.name} again; compiled kernels are kept, so it gets further"
            )
    failed = [report.name for report in reports if report.status == FAILED]
    unfinished = [report.name for report in reports if report.status == UNFINISHED]
    if failed:
        sent = f" Send {written_to} with what was printed." if written_to else ""
        lines.append(f"FAILED: {', '.join(failed)}.{sent}")
    elif unfinished:
        lines.append(f"UNFINISHED: {', '.join(unfinished)}. All else passed; {written_to} has the figures.")
    elif not on_gpu:
        lines.append(f"PASSED on the CPU, which says nothing about GPUs. {written_to} has the figures.")
    else:
        lines.append(f"PASSED. {written_to} has the figures; keep it, since thresholds are set from them.")
    return "\n".join(lines)


def exit_code(reports: Sequence[StageReport]) -> int:
    """0 if every stage passed or was skipped, else 1."""
    return int(any(report.status in (FAILED, UNFINISHED) for report in reports))


def _reasons(report: StageReport) -> list[str]:
    failed = [f"{check.name}: {check.why}" for check in report.checks if check.outcome == FAILED]
    reasons = [report.ended] if report.ended else []
    reasons += failed[:_MAX_LISTED]
    if len(failed) > _MAX_LISTED:
        reasons.append(f"and {len(failed) - _MAX_LISTED} more")
    reasons += sorted({check.why for check in report.checks if check.outcome == SKIPPED})
    left_out = [check.name for check in report.checks if check.outcome == LEFT_OUT]
    return reasons + ([f"no time was left for: {'; '.join(left_out)}"] if left_out else [])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(each)}" for key, each in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
