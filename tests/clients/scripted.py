"""A replica whose model says what the conversation's script wants, so that real clients go through a whole tool loop.

The bundled model is too small to use an agent's tools. Its script is in the user's text: `CALL {"name": ...,
"arguments": ...}` makes it write that call; once the conversation has that call and its result, it says what the
result holds. A grammar forces the text, so prompt, engine, parsing and answer are those of every other request.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen3_dist.sampling_params import StructuredOutputs
from qwen3_dist.weights.source import bundled_path
from serve_app.apis.chat.request import ChatRequest
from serve_app.apis.requests import AnyRequest
from serve_app.replica.deployment import EngineReplica

SECRET = re.compile(r"pelican-\d+")  # what the file that clients are told to read holds
CALL = re.compile(r"CALL (\{.*\})")
THOUGHTS = 16  # tokens; the model's own would go on for long
PLAIN = "Fine."


def scripted(request: AnyRequest) -> AnyRequest:
    """`request` with the answer that its conversation wants; others than chats, and forms, stay as they are."""
    if not isinstance(request, ChatRequest) or "structured_outputs" in request.sampling:
        return request
    text = answer_to(request.messages, [tool["function"]["name"] for tool in request.tools])
    form = StructuredOutputs(choice=(text,))
    forced = {"structured_outputs": form, "thinking_token_budget": THOUGHTS, "temperature": 0}
    return replace(request, sampling={**request.sampling, **forced})


def answer_to(messages: list[dict[str, Any]], tools: list[str]) -> str:
    """What the model says after `messages`, raw."""
    asked = (_plain(message["content"]) for message in messages if message["role"] == "user")
    found = next((found for text in asked if (found := CALL.search(text))), None)
    if found is None:
        return PLAIN
    call = found.group(1).replace('\\"', '"').removesuffix('"')  # opencode quotes its command line
    name = json.loads(call)["name"]
    called = {c["function"]["name"] for message in messages for c in message.get("tool_calls") or []}
    results = json.dumps([message["content"] for message in messages if message["role"] == "tool"])
    if name in called and (secret := SECRET.search(results)):
        return f"The file says {secret.group()}."
    return f"<tool_call>\n{call}\n</tool_call>" if name in tools else PLAIN


def _plain(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def long_checkpoint(directory: Path) -> Path:
    """The bundled model in `directory`, with a context in which agents' prompts have room: Claude Code's has 36,000
    tokens."""
    shutil.copytree(bundled_path(), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 65_536}))
    return directory


class ScriptedReplica(EngineReplica):
    async def answer(self, request: AnyRequest, request_id: str) -> AsyncGenerator[Any, None]:
        async for item in super().answer(scripted(request), request_id):
            yield item
