"""OpenAI's responses: the answer's output items and stream events, and the error event."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_dist.text.choice import ChoiceDelta
from serve_app.apis.responses.tools import CalledTool
from serve_app.apis.shared.answer import AnswerContext, Json, event
from serve_app.apis.shared.blocks import Block, BlockAnswer
from serve_app.apis.shared.custom_tools import CustomInput
from serve_app.apis.shared.errors import error_object
from serve_app.apis.shared.text_logprobs import TextLogprobs

# The data of an event, as `event` writes it: no text in it has quotes without a backslash.
_NUMBER = re.compile(rb'^data: \{"type":"[a-z_.]+","sequence_number":(\d+)', re.MULTILINE)


def response_error_event(error: Exception, sequence_number: int = 0) -> bytes:
    """Returns the error event of /v1/responses, whose fields are not nested in an error object."""
    details = error_object(error)["error"]
    fields = {name: details[name] for name in ("code", "message", "param")}
    return event({"type": "error", "sequence_number": sequence_number, **fields}, "error")


def next_error_event(error: Exception, sent: bytes = b"") -> bytes:
    """Returns the error event that follows the events `sent` last, whose sequence numbers it continues."""
    numbers = _NUMBER.findall(sent)
    return response_error_event(error, int(numbers[-1]) + 1 if numbers else 0)


class ResponseAnswer(BlockAnswer):
    """Serializes `response` and its stream events.

    `echoed_fields` are the request's fields that the response repeats. `called_tools` maps a tool's name in the prompt
    to its name in the response. `logprobs` adds the text's log-probabilities.
    """

    def __init__(
        self,
        context: AnswerContext,
        echoed_fields: Json,
        called_tools: Mapping[str, CalledTool],
        logprobs: bool = False,
    ) -> None:
        super().__init__(context)
        self._echoed_fields = echoed_fields
        self._called_tools = called_tools
        self._input: CustomInput | None = None  # of the open custom tool call
        self._created = context.identity.created
        self._output: list[Json] = []
        self._scores = TextLogprobs(context.tokenizer) if logprobs and context.tokenizer else None
        self.repeats_logprobs = self._scores is not None
        self._delta_scores: list[Json] = []  # of the current delta
        self._num_events = 0

    def begin(self) -> bytes:
        return b"".join(
            self._event(kind, response=self._response("in_progress"))
            for kind in ("response.created", "response.in_progress")
        )

    def end(self) -> bytes:
        closed = self.close()
        status = self._status()
        return closed + self._event(f"response.{status}", response=self._response(status))

    def fail(self, error: Exception) -> bytes:
        details = error_object(error)["error"]
        failed = {"code": details["code"] or "server_error", "message": details["message"]}
        event = response_error_event(error, self._num_events)
        self._num_events += 1
        return event + self._event("response.failed", response=self._response("failed", failed))

    def count(self, delta: ChoiceDelta) -> None:
        super().count(delta)
        if self._scores:
            self._scores.push(delta)

    def delta(self, delta: ChoiceDelta) -> bytes:
        if self._scores:
            self._delta_scores += self._scores.pop()
        return super().delta(delta)

    def full_response(self, choices: Sequence[ChoiceDelta]) -> Json:
        if self._scores:
            self._delta_scores = self._scores.pop_all()
        super().delta(choices[0])
        self.close()
        return self._response(self._status())

    def open_block(self, block: Block) -> bytes:
        number, kind = len(self._output), block.kind
        if kind == "reasoning":
            item: Json = {"type": "reasoning", "id": f"rs_{self.unique}_{number}", "summary": []}
        elif kind == "text":
            item = {"type": "message", "id": f"msg_{self.unique}_{number}", "role": "assistant"}
        else:
            item = self._call_item(block)
        item["status"] = "in_progress"
        if kind == "tool_call":
            self._output.append(item)
            return self._item_event("added")
        self._output.append({**item, "content": []})
        added = self._item_event("added")
        part: Json = {"type": "reasoning_text", "text": ""}
        if kind == "text":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._output[-1]["content"].append(part)
        return added + self._part_event("response.content_part.added", part=part)

    def extend_block(self, block: Block, text: str) -> bytes:
        item = self._output[-1]
        if self._input:
            return self._extend_input(self._input.push(text))
        if block.kind == "tool_call":
            item["arguments"] += text
            return self._event("response.function_call_arguments.delta", **self._item_ids(), delta=text)
        item["content"][0]["text"] += text
        if block.kind == "reasoning":
            return self._part_event("response.reasoning_text.delta", delta=text)
        scores, self._delta_scores = self._delta_scores, []
        item["content"][0]["logprobs"] += scores
        return self._part_event("response.output_text.delta", delta=text, logprobs=scores)

    def close_block(self, block: Block) -> bytes:
        item = self._output[-1]
        item["status"] = "completed" if self._status() == "completed" else "incomplete"
        if self._input:
            rest = self._extend_input(self._input.finish())
            self._input = None
            done = self._event(
                "response.custom_tool_call_input.done", **self._item_ids(), input=item["input"]
            )
            return rest + done + self._item_event("done")
        if block.kind == "tool_call":
            arguments = item["arguments"]
            done = self._event(
                "response.function_call_arguments.done",
                **self._item_ids(),
                name=item["name"],
                arguments=arguments,
            )
            return done + self._item_event("done")
        part = item["content"][0]
        if block.kind == "reasoning":
            done = self._part_event("response.reasoning_text.done", text=part["text"])
        else:
            done = self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        return done + self._part_event("response.content_part.done", part=part) + self._item_event("done")

    def _call_item(self, block: Block) -> Json:
        called = self._called_tools.get(block.name or "", CalledTool(block.name or ""))
        self._input = CustomInput() if called.custom else None
        place = f"{self.unique}_{len(self._output)}"
        item: Json = {"type": "function_call", "id": f"fc_{place}", "arguments": ""}
        if called.custom:
            item = {"type": "custom_tool_call", "id": f"ctc_{place}", "input": ""}
        space = {"namespace": called.namespace} if called.namespace else {}
        return {**item, "call_id": block.call_id, "name": called.name, **space}

    def _extend_input(self, text: str) -> bytes:
        self._output[-1]["input"] += text
        return (
            self._event("response.custom_tool_call_input.delta", **self._item_ids(), delta=text)
            if text
            else b""
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._num_events
        self._num_events += 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)

    def _item_event(self, what: str) -> bytes:
        place = {"output_index": len(self._output) - 1}
        return self._event(f"response.output_item.{what}", **place, item=self._output[-1])

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, **self._item_ids(), content_index=0, **fields)

    def _item_ids(self) -> Json:
        """Returns the fields that identify the last output item in an event."""
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _status(self) -> str:
        is_cut = self.last is not None and self.last.finish_reason == "length"
        return "incomplete" if is_cut else "completed"

    def _response(self, status: str, error: Json | None = None) -> Json:
        return {
            "id": f"resp_{self.unique}",
            "object": "response",
            "created_at": self._created,
            "completed_at": max(self._created, int(time.time())) if status == "completed" else None,
            "model": self.context.model,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._output,
            "usage": None if status in ("in_progress", "failed") else self._usage(),
            **self._echoed_fields,
        }

    def _usage(self) -> Json:
        usage = self.usage
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.completion,
        }
