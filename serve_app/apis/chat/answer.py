"""OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.text.choice import ChoiceDelta
from qwen3_dist.text.parsed import ToolCallDelta
from serve_app.apis.shared.answer import Json, Served
from serve_app.apis.shared.custom_tools import CustomInput
from serve_app.apis.shared.openai import OpenAIAnswer, Shown, logprob


class ChatAnswer(OpenAIAnswer):
    """`chat.completion` and its chunks; `echoed` is text that comes ahead of each choice's. Calls of `custom_tools`
    have plain text in place of arguments.
    """

    prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(
        self, served: Served, shown: Shown, echoed: str = "", custom_tools: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(served, shown)
        self._echoed = echoed
        self._begun: set[int] = set()
        self._custom_tools = custom_tools
        self._inputs: dict[tuple[int, int], CustomInput] = {}  # of custom calls, by choice and call

    def whole(self, choices: Sequence[ChoiceDelta]) -> Json:
        scores = self.prompt_logprobs(choices[0])
        return super().whole(choices) | ({} if scores is None else {"prompt_logprobs": scores})

    def choice(self, delta: ChoiceDelta) -> Json:
        thought = self._reasoning(delta)
        text = self._echoed + delta.text
        silent = not text and (delta.reasoning or delta.tool_calls)
        message: Json = {"role": "assistant", "content": None if silent else text, **thought}
        if delta.tool_calls:
            message["tool_calls"] = [self._whole_call(call) for call in delta.tool_calls]
        return self._with(delta, {"message": message})

    def chunk_choices(self, delta: ChoiceDelta) -> list[Json]:
        """The role alone comes first, with an empty content, as OpenAI sends it."""
        chunks = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            role = {"role": "assistant", "content": self._echoed}
            chunks.append({"index": delta.index, "delta": role, "logprobs": None, "finish_reason": None})
        shown = self._reasoning(delta)
        if delta.text:
            shown["content"] = delta.text
        if calls := self._call_parts(delta):
            shown["tool_calls"] = calls
        if shown or delta.logprobs or delta.finish_reason or self.shown.token_ids:
            chunks.append(self._with(delta, {"delta": shown}))
        return chunks

    def _with(self, delta: ChoiceDelta, body: Json) -> Json:
        content = [
            {**self._token(p.token_id, p.logprob), "top_logprobs": self._top(p)} for p in delta.logprobs
        ]
        return {
            "index": delta.index,
            **body,
            "logprobs": {"content": content} if content else None,
            "finish_reason": delta.finish_reason,
            **self.beside(delta),
        }

    def _reasoning(self, delta: ChoiceDelta) -> Json:
        """Under both names that clients read."""
        if not (delta.reasoning and self.shown.reasoning):
            return {}
        return {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}

    def _top(self, chosen: TokenLogprob) -> list[Json]:
        return [self._token(*alternative) for alternative in chosen.top]

    def _token(self, token_id: int, value: float) -> Json:
        tokenizer = self.served.tokenizer
        data = tokenizer and list(tokenizer.token_bytes(token_id))
        return {"token": self.token_name(token_id), "logprob": logprob(value), "bytes": data}

    def _whole_call(self, call: ToolCallDelta) -> Json:
        if call.name in self._custom_tools:
            given = CustomInput()
            text = given.push(call.arguments) + given.finish()
            return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": text}}
        return {"id": call.id, "type": "function", "function": _named(call.name, arguments=call.arguments)}

    def _call_parts(self, delta: ChoiceDelta) -> list[Json]:
        """The parts of calls that `delta` shows; only the first of a call has its id, type and name."""
        shown = []
        for call in delta.tool_calls:
            key = (delta.index, call.index)
            if call.name in self._custom_tools:
                self._inputs[key] = CustomInput()
            kind, part = "function", {"arguments": call.arguments}
            if given := self._inputs.get(key):
                kind, part = "custom", {"input": given.push(call.arguments)}
            begun = {} if call.name is None else {"id": call.id, "type": kind}
            shown.append({"index": call.index, **begun, kind: _named(call.name, **part)})
        return shown + (self._last_inputs(delta.index) if delta.finish_reason else [])

    def _last_inputs(self, choice: int) -> list[Json]:
        rests = {call: given.finish() for (index, call), given in self._inputs.items() if index == choice}
        return [{"index": call, "custom": {"input": rest}} for call, rest in rests.items() if rest]


def _named(name: str | None, **part: str) -> Json:
    return dict(part) if name is None else {"name": name, **part}
