"""Chat templates render what transformers renders, and a bad one harms only its own request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_dist.errors import CheckpointError, RequestError
from qwen3_dist.text.chat_template import ChatTemplate

REPO = Path(__file__).resolve().parents[2]
BUNDLED = REPO / "qwen3_dist" / "bundled"
REAL = REPO.parent / "shared" / "data" / "qwen3-tokenizer"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="the real Qwen3 tokenizer is not at hand")

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter <b>jetzt</b> & 'später'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "call_1"}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "Be brief."}
CALLED = assistant("", tool_calls=[call("get_weather", {"city": "Zürich <1>"})])
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [user("Hi")],
    "system": [SYSTEM, user("Hi")],
    "system alone": [SYSTEM],
    "later system": [user("Hi"), SYSTEM, user("again")],
    "multi-turn": [user("a"), assistant("b"), user("c"), assistant("d"), user("e")],
    "unicode": [user('日本語 👩‍👩‍👧 e\u0301 <b> & "quotes"'), assistant("ok"), user("\n lines \n")],
    "ends with an answer": [user("a"), assistant("\n\nb")],
    "only answers": [assistant("a"), assistant("b")],
    "reasoning in the past": [user("a"), assistant("b", reasoning_content="because"), user("c")],
    "reasoning at the end": [user("a"), assistant("\nb", reasoning_content="\nbecause\n")],
    "empty reasoning": [user("a"), assistant("b", reasoning_content=""), assistant("c")],
    "reasoning by its other names": [user("a"), assistant("b", reasoning="r"), assistant("c", thinking="t")],
    "reasoning in the text": [user("a"), assistant("<think>\nwhy\n</think>\n\nb"), user("c")],
    "reasoning in the final text": [user("a"), assistant("<think>\nwhy\n</think>\n\nb")],
    "reasoning without its opening tag": [user("a"), assistant("why</think>b</think>\nc")],
    "null fields": [user("a"), assistant("b", reasoning_content=None, tool_calls=None), user("c")],
    "a tool call": [user("weather?"), CALLED],
    "a tool result": [user("weather?"), CALLED, tool('{"sun": true}')],
    "tool results side by side": [user("weather?"), CALLED, tool("1"), tool("2"), assistant("3"), tool("4")],
    "text before two calls": [
        SYSTEM,
        user("weather?"),
        assistant("Let me see.", tool_calls=[call("clock", "{}"), call("get_weather", '{"city":"Rom"}')]),
        tool("12:00"),
        tool("sun"),
        assistant("It is noon."),
    ],
    "reasoning between calls": [
        user("weather?"),
        {**CALLED, "reasoning_content": "I need it"},
        tool("sun"),
        {**CALLED, "reasoning_content": "again"},
        tool("rain"),
    ],
    "a question after tools": [user("weather?"), CALLED, tool("sun"), assistant("Sunny."), user("thanks")],
    "calls without the function wrapper": [
        user("a"),
        assistant("", tool_calls=[{"name": "f", "arguments": [1]}]),
    ],
    "results as a user turn": [
        user("a"),
        assistant("b"),
        user("<tool_response>\n1\n</tool_response>"),
        assistant("c"),
    ],
    "an unknown role": [user("a"), {"role": "critic", "content": "hm"}, user("b")],
}


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"enable_thinking": True},
    {"enable_thinking": False},
    {"add_generation_prompt": False},
)


@pytest.fixture(scope="module")
def oracle() -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(REAL)


@needs_real
@pytest.mark.parametrize("directory", [REAL, BUNDLED], ids=["real", "bundled"])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_prompts_equal_those_of_transformers_with_the_real_template(
    oracle: Any, directory: Path, messages: list[dict[str, Any]]
) -> None:
    template = ChatTemplate.from_directory(directory)
    assert template is not None
    for tools in (None, [WEATHER, CLOCK]):
        for options in OPTIONS:
            expected = oracle.apply_chat_template(
                messages, tools=tools, tokenize=False, **{"add_generation_prompt": True, **options}
            )
            assert template.render(messages, tools, **options) == expected, (tools, options)


def test_the_bundled_template_writes_chatml_and_an_empty_think_block_when_thinking_is_off() -> None:
    template = ChatTemplate.from_directory(BUNDLED)
    assert template is not None
    prompt = template.render([SYSTEM, user("Hi")], enable_thinking=False)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def template_of(source: str, **special_tokens: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, special_tokens)


def test_text_parts_are_joined_and_a_missing_content_is_empty() -> None:
    template = template_of("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
    ]
    assert template.render(messages) == "[ab][][]"


@pytest.mark.parametrize(
    "content",
    [[{"type": "image_url", "image_url": {"url": "x"}}], [{"type": "text"}], ["a"], {"type": "text"}, 3],
)
def test_content_that_is_not_text_is_refused(content: Any) -> None:
    with pytest.raises(RequestError, match="string or text parts") as refused:
        template_of("{{ messages }}").render([{"role": "user", "content": content}])
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.missing.attribute }}", "no attribute"),
        ("{{ 'a' + messages }}", "list"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
        ("{{ strftime_now.__globals__['json'] }}", "unsafe"),
        ("{{ dict.mro() }}", "no attribute 'mro'"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        ("{% set n = namespace() %}{% set n.__call__ = 1 %}", "__call__"),
        ("{% set n = namespace(**{'__call__': 1}) %}", "__call__"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange"),
        ("{% include 'x' %}", "loader"),
    ],
)
def test_what_goes_wrong_in_a_template_is_the_requests_error(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        template_of(source).render([user("Hi")])
    assert refused.value.param == "messages"
    assert refused.value.status == 400


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one message"):
        template_of("x").render([])


def test_templates_find_the_helpers_they_expect() -> None:
    template = template_of(
        "{{ bos_token }}{{ {'b': 'é<', 'a': 1} | tojson }}{% for i in [1, 2, 3] %}"
        "{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}{{ dict(a=1).a }}"
        "{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}{{ strftime_now('%Y') | length }}"
        "{% generation %}g{% endgeneration %}{{ documents is none }}",
        bos_token="<s>",
    )
    assert template.render([user("Hi")]) == '<s>{"b": "é<", "a": 1}1312' + "4gTrue"


def test_block_tags_leave_no_line_of_their_own() -> None:
    assert (
        template_of("{% if true %}\n  {% if true %}\n  x\n  {% endif %}\n{% endif %}\n").render([user("")])
        == "  x\n"
    )


NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": json.dumps({"chat_template": NAMED})},
        {"tokenizer_config.json": json.dumps({"chat_template": {t["name"]: t["template"] for t in NAMED}})},
        {"chat_template.jinja": "plain", "additional_chat_templates/tool_use.jinja": "tools"},
    ],
    ids=["list", "object", "files"],
)
def test_the_tool_template_is_used_when_there_are_tools(tmp_path: Path, files: dict[str, str]) -> None:
    template = ChatTemplate.from_directory(written(tmp_path, files))
    assert template is not None
    assert template.render([user("Hi")]) == "plain"
    assert template.render([user("Hi")], tools=[CLOCK]) == "tools"


@pytest.mark.parametrize("present", [["jinja", "config", "json"], ["config", "json"], ["json"]])
def test_the_first_of_the_three_template_files_wins(tmp_path: Path, present: list[str]) -> None:
    sources = {
        "jinja": ("chat_template.jinja", "jinja"),
        "config": ("tokenizer_config.json", '{"chat_template": "config"}'),
        "json": ("chat_template.json", '{"chat_template": "json"}'),
    }
    template = ChatTemplate.from_directory(written(tmp_path, dict(sources[name] for name in present)))
    assert template is not None
    assert template.render([user("Hi")]) == present[0]


def test_a_directory_without_a_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.from_directory(written(tmp_path, {"tokenizer_config.json": "{}"})) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"chat_template.jinja": "{% if %}"}, "not valid Jinja"),
        ({"chat_template.jinja": "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}"}, "not valid Jinja"),
        ({"chat_template.jinja": "{% for a in b %}" * 30 + "{% endfor %}" * 30}, "not valid Jinja"),
        ({"tokenizer_config.json": "{"}, "cannot be read as JSON"),
        ({"tokenizer_config.json": "[]"}, "JSON object"),
        ({"tokenizer_config.json": '{"chat_template": 3}'}, "'default'"),
        (
            {"tokenizer_config.json": '{"chat_template": [{"name": "tool_use", "template": "x"}]}'},
            "'default'",
        ),
    ],
)
def test_a_damaged_template_file_is_a_checkpoint_error(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        ChatTemplate.from_directory(written(tmp_path, files))


def written(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    return directory
