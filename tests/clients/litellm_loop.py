"""litellm: a tool loop by each of its routes, and its fallback for prompts that are too long.

python litellm_loop.py BASE_URL MODEL PROMPT
"""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

URL, MODEL, PROMPT = sys.argv[1:]
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
TOOL = {"type": "function", "function": {"name": "read_file", "parameters": SCHEMA}}
# Names of our model by litellm's providers, and the base that each wants.
ROUTES = {"openai": f"{URL}/v1", "hosted_vllm": f"{URL}/v1", "anthropic": URL}


def loop(provider: str, stream: bool) -> dict[str, Any]:
    asked = {
        "model": f"{provider}/{MODEL}",
        "api_base": ROUTES[provider],
        "api_key": "none",
        "tools": [TOOL],
        "max_tokens": 200,
        "num_retries": 0,
    }
    messages: list[Any] = [{"role": "user", "content": PROMPT}]

    def answer() -> Any:
        given = litellm.completion(messages=messages, stream=stream, **asked)
        whole = litellm.stream_chunk_builder(list(given), messages=messages) if stream else given
        return whole.choices[0]

    first = answer()
    [call] = first.message.tool_calls
    messages += [
        first.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "pelican-4711"},
    ]
    last = answer()
    return {
        "finish": [first.finish_reason, last.finish_reason],
        "call": [call.function.name, json.loads(call.function.arguments)],
        "text": last.message.content,
    }


def overflow(provider: str) -> dict[str, Any]:
    long = [{"role": "user", "content": "word " * 200_000}]
    small = {"model": f"{provider}/{MODEL}", "api_base": ROUTES[provider], "api_key": "none", "max_tokens": 5}
    try:
        litellm.completion(messages=long, num_retries=0, **small)
        raised = ""
    except Exception as error:
        raised = type(error).__name__
    router = litellm.Router(
        model_list=[
            {"model_name": "small", "litellm_params": small},
            {
                "model_name": "large",
                "litellm_params": {"model": "openai/x", "api_key": "x", "mock_response": "large"},
            },
        ],
        context_window_fallbacks=[{"small": ["large"]}],
        num_retries=0,
    )
    told = router.completion(model="small", messages=long).choices[0].message.content
    return {"raised": raised, "told": told}


loops = {
    f"{provider} {kind}": loop(provider, kind == "streamed")
    for provider in ROUTES
    for kind in ("whole", "streamed")
}
print(json.dumps({"loops": loops, "overflows": {provider: overflow(provider) for provider in ROUTES}}))
