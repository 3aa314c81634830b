"""Client libraries that are not in `.venv`: a whole tool loop by each route that they have to us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import INSTALLED, MODEL, Machine
from tests.clients.recorder import Recorder
from tests.clients.test_agents import TOLD, script

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
PROMPT = script("read_file", {"path": "secret.txt"})


def node(machine: Machine, program: str, *arguments: str) -> Any:
    """What a program of ours for Node prints, as JSON."""
    source = (HERE / program).read_text()
    return json.loads(
        machine.run("node", "--input-type=module", "-", *arguments, cwd=INSTALLED, stdin=source).splitlines()[
            -1
        ]
    )


@pytest.mark.needs("node_modules/ai")
@pytest.mark.parametrize("route", ["responses", "chat", "compatible", "anthropic"])
def test_the_ai_sdk_goes_through_a_tool_loop(recorder: Recorder, machine: Machine, route: str) -> None:
    told = node(machine, "ai_sdk.mjs", route, recorder.url, MODEL, PROMPT)
    expected = {"text": TOLD, "calls": [["read_file"], []], "finish": "stop"}
    assert told == {"whole": expected, "streamed": expected}
    if route == "responses":  # which refers to what the service stored
        types = [item.get("type") for one in recorder.generations() for item in one.body["input"]]
        assert "item_reference" in types


@pytest.mark.needs("node_modules/openai")
@pytest.mark.parametrize("api", ["openai", "anthropic"])
def test_the_vendors_tool_runners_go_through_a_loop(recorder: Recorder, machine: Machine, api: str) -> None:
    recorder.refusals_are_wanted = (
        api == "anthropic"
    )  # of a thread, after which the client sends whole histories
    told = node(machine, "vendor_sdks.mjs", api, recorder.url, MODEL, PROMPT)
    assert told == {"told": [TOLD, TOLD], "models": [MODEL]}
    refused = [one.body.get("thread") for one in recorder.exchanges if one.status >= 400]
    assert refused == ([{"type": "create"}] * 2 if api == "anthropic" else [])


@pytest.mark.needs("litellm/bin/python")
def test_litellm_goes_through_loops_and_falls_back_where_the_prompt_is_too_long(
    recorder: Recorder, machine: Machine
) -> None:
    recorder.refusals_are_wanted = True
    python = str(INSTALLED / "litellm" / "bin" / "python")
    printed = machine.run(
        python,
        str(HERE / "litellm_loop.py"),
        recorder.url,
        MODEL,
        PROMPT,
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    told = json.loads(printed.splitlines()[-1])
    expected = {
        "finish": ["tool_calls", "stop"],
        "call": ["read_file", {"path": "secret.txt"}],
        "text": TOLD,
    }
    assert set(told["loops"]) == {
        f"{provider} {kind}"
        for provider in ("openai", "hosted_vllm", "anthropic")
        for kind in ("whole", "streamed")
    }
    assert all(found == expected for found in told["loops"].values()), told["loops"]
    wanted = {"raised": "ContextWindowExceededError", "told": "large"}
    assert told["overflows"] == dict.fromkeys(("openai", "hosted_vllm", "anthropic"), wanted)
