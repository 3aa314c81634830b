"""How far a request got, in the eyes of the ingress that has replicas answer it."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.apis.shared.answer import Counted
from serve_app.apis.shared.resume import Resume


@dataclass
class Progress:
    """How far one request got, over all replicas that ran it.

    `runs` while a replica has it, `ran` once one had it; `waits` if it only waits there. `lost_s` is when the first
    replica was lost since one has begun it, by the event loop's clock. `deaths` counts the last replicas in a row that
    may have died of it: of those that were lost after they had begun it, the last that sent tokens (`progressed`) and
    those since. `accepted`, `begun` and `ended` tell what the client has seen: the status of a stream, a part of the
    answer, the last part. `replica` is the id of the replica that has told last that it has the request;
    `replica_died` unless that one has said why it gives it up.
    """

    resume: Resume = field(default_factory=Resume)
    charged: int = 0
    runs: bool = False
    ran: bool = False
    waits: bool = False
    lost_s: float | None = None
    deaths: int = 0
    progressed: bool = False
    accepted: bool = False
    begun: bool = False
    ended: bool = False
    replica: str = ""
    replica_died: bool = True

    def taken(self) -> bool:
        """Notes that a replica has the request. Returns whether it has it in place of one that was lost."""
        again = self.ran and not self.runs
        self.runs = self.ran = True
        return again

    def count(self, item: Counted) -> int:
        """Notes what a part covers. Returns the tokens that it adds to those that were charged."""
        added = max(0, item.tokens - self.charged)
        self.charged += added
        resume = self.resume
        resume.model = item.model or resume.model  # weights may change while an answer is generated
        if item.sent:
            resume.add(item.sent)
            self.progressed = True
        return added

    def lose(self, leaves: bool = False) -> None:
        """Notes that the replica was lost. It has not died of the request if it was told to leave, or if no step has
        held the request."""
        deaths = 0 if leaves or self.waits else 1
        self.deaths = deaths if self.progressed else self.deaths + deaths
        if leaves or not self.waits:
            self.lost_s = None  # the time for another replica starts anew
        self.runs = self.progressed = False
