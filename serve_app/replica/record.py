"""`RequestRecord`: one request on a replica, for its log lines, its traces, and the ingress's access line."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3_dist.sampling_params import SamplingParams
from serve_app.apis.completions import CompletionRequest
from serve_app.apis.embeddings import EmbeddingRequest
from serve_app.apis.requests import AnyRequest
from serve_app.apis.shared.answer import Running, Usage
from serve_app.apis.shared.generation import GenerationRequest
from serve_app.apis.shared.prompts import Prompt
from serve_app.apis.shared.resume import Sent
from serve_app.metrics.requests import PromptWatch
from serve_app.telemetry.summary import RequestSummary
from serve_app.telemetry.traces import record_request

logger = logging.getLogger("qwen3_dist.requests")


@dataclass
class RequestRecord:
    """What happens to a request. `request_id` is that of the HTTP request; `trace` has the headers of its trace;
    `num_bytes` is about the size of the parsed request; `tell` sends the ingress an item."""

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    trace: Mapping[str, str] = field(default_factory=dict)
    replica: str = ""
    num_bytes: float = math.inf
    model: str = ""
    stream: bool = False
    params: SamplingParams | None = None
    usage: Usage | None = None
    sent: Sent = ()  # what the stream's last item adds to what the client has
    fingerprint: str = ""  # of the checkpoint and of the adapter, which is that of the first token
    adapter: str = ""  # its digest
    watches: list[PromptWatch] = field(default_factory=list)
    ended: bool = False  # whether the answer's next part is its last
    failed: bool = False
    arrival_s: float = field(default_factory=time.monotonic)
    tell: Callable[[Running], object] = lambda item: None
    _num_prompts: int = 0  # given to the engine
    _num_waiting: int = 0
    _waits: bool = False

    def wait(self, waits: bool) -> None:
        """Takes that the engine has one of the prompts wait, or begins one that did. Tells the ingress when all wait,
        and when that is over."""
        self._num_waiting += 1 if waits else -1
        if self._waits != (self._num_waiting == self._num_prompts):
            self._waits = not self._waits
            self.tell(Running(self.replica, self._waits))

    def engine_id(self) -> str:
        """A new id for a prompt in the engine; the engine's log lines show it."""
        self._num_prompts += 1
        return f"{self.request_id}-{uuid.uuid4().hex[:8]}"

    def log_request(self, prompts: list[Prompt], params: SamplingParams) -> None:
        """Logs what was asked, prompts included."""
        fields = {
            "request_id": self.request_id,
            "prompts": [prompt.token_ids if prompt.text is None else prompt.text for prompt in prompts],
            "params": repr(params),
        }
        logger.info("asked", extra={"fields": fields})

    def summary(self) -> RequestSummary:
        """What is known of the request now."""
        usage = self.usage or Usage(0)
        stages = [watch.stages for watch in self.watches]
        queued, scheduled, first, last = (
            (list(filter(None, each)) for each in zip(*stages, strict=True)) if (stages) else ([], [], [], [])
        )
        return RequestSummary(
            self.replica,
            self.model,
            usage.prompt,
            usage.completion,
            usage.cached,
            self._since_arrival(min(queued, default=None)),
            self._since_arrival(min(scheduled, default=None)),
            self._since_arrival(min(first, default=None)),
            self._since_arrival(max(last, default=None)),
            time.monotonic() - self.arrival_s,
            tuple(reason for watch in self.watches for reason in watch.finish_reasons)
            or (("error",) if self.failed else ()),
        )

    def _since_arrival(self, time_s: float | None) -> float | None:
        return None if time_s is None else max(0.0, time_s - self.arrival_s)

    def close(self, request: AnyRequest) -> None:
        """Records the request's spans, and logs it if the ingress does not hear of its end."""
        summary = self.summary()
        if not self.ended:
            fields = {"request_id": self.request_id, **summary.fields()}
            logger.info("ended early", extra={"fields": fields})
        record_request(_operation(request), self.request_id, self.trace, summary, self._parameters())

    def _parameters(self) -> dict[str, Any]:
        params = self.params
        if params is None:
            return {}
        return {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k if params.top_k > 0 else None,
            "max_tokens": params.max_tokens,
            "frequency_penalty": params.frequency_penalty or None,
            "presence_penalty": params.presence_penalty or None,
            "seed": params.seed,
            "choice.count": params.n if params.n > 1 else None,
            "stream": self.stream,
        }


def _operation(request: AnyRequest) -> str:
    """The request's gen_ai.operation.name; for what the conventions do not name, the class's name."""
    if isinstance(request, CompletionRequest):
        return "text_completion"
    if isinstance(request, GenerationRequest):
        return "chat"
    if isinstance(request, EmbeddingRequest):
        return "embeddings"
    return type(request).__name__.removesuffix("Request").lower()
