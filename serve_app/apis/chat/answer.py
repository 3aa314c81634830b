"""OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.text.choice import ChoiceDelta
from qwen3_dist.text.parsed import ToolCallDelta
from serve_app.apis.shared.answer import AnswerContext, Json
from serve_app.apis.shared.custom_tools import CustomInput
from serve_app.apis.shared.openai import AnswerOptions, OpenAIAnswer, logprob


class ChatAnswer(OpenAIAnswer):
    """Serializes `chat.completion` and its chunks.

    `echoed` is text put ahead of each choice. Calls of `custom_tools` have a plain-text input instead of arguments.
    """

    prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(
        self,
        context: AnswerContext,
        options: AnswerOptions,
        echoed: str = "",
        custom_tools: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(context, options)
        self._echoed = echoed
        self._begun: set[int] = set()  # indices of choices
        self._custom_tools = custom_tools
        self._inputs: dict[
            tuple[int, int], CustomInput
        ] = {}  # of custom tool calls, by choice and call index

    def full_response(self, choices: Sequence[ChoiceDelta]) -> Json:
        scores = self.prompt_logprobs(choices[0])
        return super().full_response(choices) | ({} if scores is None else {"prompt_logprobs": scores})

    def is_plain(self, delta: ChoiceDelta) -> bool:
        shows = self.options.reasoning or not delta.reasoning
        return super().is_plain(delta) and delta.index in self._begun and shows

    def choice(self, delta: ChoiceDelta) -> Json:
        text = self._echoed + delta.text
        has_no_content = not text and (delta.reasoning or delta.tool_calls)
        message: Json = {
            "role": "assistant",
            "content": None if has_no_content else text,
            **self._reasoning(delta),
        }
        if delta.tool_calls:
            message["tool_calls"] = [self._whole_call(call) for call in delta.tool_calls]
        return self._choice(delta, {"message": message})

    def chunk_choices(self, delta: ChoiceDelta) -> list[Json]:
        """Returns the chunks for `delta`; as in OpenAI, a choice's first chunk has the role and empty content."""
        chunks = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            role = {"role": "assistant", "content": self._echoed}
            chunks.append({"index": delta.index, "delta": role, "logprobs": None, "finish_reason": None})
        fields = self._reasoning(delta)
        if delta.text:
            fields["content"] = delta.text
        if calls := self._call_parts(delta):
            fields["tool_calls"] = calls
        if fields or delta.logprobs or delta.finish_reason or self.options.token_ids:
            chunks.append(self._choice(delta, {"delta": fields}))
        return chunks

    def _choice(self, delta: ChoiceDelta, content: Json) -> Json:
        """Returns a choice with `content`, its `message` or `delta`."""
        logprobs = [
            {**self._token(p.token_id, p.logprob), "top_logprobs": self._top(p)} for p in delta.logprobs
        ]
        return {
            "index": delta.index,
            **content,
            "logprobs": {"content": logprobs} if logprobs else None,
            "finish_reason": delta.finish_reason,
            **self.vllm_fields(delta),
        }

    def _reasoning(self, delta: ChoiceDelta) -> Json:
        """Returns the reasoning under both names that clients read."""
        if not (delta.reasoning and self.options.reasoning):
            return {}
        return {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}

    def _top(self, chosen: TokenLogprob) -> list[Json]:
        return [self._token(*alternative) for alternative in chosen.top]

    def _token(self, token_id: int, value: float) -> Json:
        tokenizer = self.context.tokenizer
        data = tokenizer and list(tokenizer.token_bytes(token_id))
        return {"token": self.token_name(token_id), "logprob": logprob(value), "bytes": data}

    def _whole_call(self, call: ToolCallDelta) -> Json:
        if call.name in self._custom_tools:
            given = CustomInput()
            text = given.push(call.arguments) + given.finish()
            return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": text}}
        return {"id": call.id, "type": "function", "function": _named(call.name, arguments=call.arguments)}

    def _call_parts(self, delta: ChoiceDelta) -> list[Json]:
        """Returns the parts of tool calls in `delta`. Only the first part of a call has its id, type and name."""
        parts = []
        for call in delta.tool_calls:
            key = (delta.index, call.index)
            if call.name in self._custom_tools:
                self._inputs[key] = CustomInput()
            kind, part = "function", {"arguments": call.arguments}
            if given := self._inputs.get(key):
                kind, part = "custom", {"input": given.push(call.arguments)}
            begun = {} if call.name is None else {"id": call.id, "type": kind}
            parts.append({"index": call.index, **begun, kind: _named(call.name, **part)})
        return parts + (self._last_inputs(delta.index) if delta.finish_reason else [])

    def _last_inputs(self, choice: int) -> list[Json]:
        """Returns what the end of `choice` adds to the inputs of its custom tool calls."""
        rests = {call: given.finish() for (index, call), given in self._inputs.items() if index == choice}
        return [{"index": call, "custom": {"input": rest}} for call, rest in rests.items() if rest]


def _named(name: str | None, **part: str) -> Json:
    """Returns `part` with the `name` of the call, which only its first part has."""
    return dict(part) if name is None else {"name": name, **part}
