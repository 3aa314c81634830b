"""Kinds of fields that Anthropic's and OpenAI's newer API still read by."""

from __future__ import annotations

import re

from serve_app.apis.shared.kinds import (
    FILLED_TEXT,
    OBJECT,
    TEXT,
    Field,
    ListOf,
    Plain,
    Record,
    number,
    number_above,
    one_of,
)  # fmt: skip

MODEL = Field(TEXT, "The served model's name, or an adapter's; absent, it is the model.")
TEMPERATURE = Field(number(0, 2), "0 always takes the likeliest token.")
TOP_P = Field(number_above(0, 1), "Keeps the likeliest tokens that have this probability together.")
EFFORT = Field(
    one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"), "none answers without thinking."
)
_GRAMMAR = {"syntax": Field(TEXT, "lark or regex."), "definition": Field(TEXT, "The grammar.")}
CUSTOM_FORMAT = Field(
    Record(
        "an object with type",
        {
            "type": Field(FILLED_TEXT, required=True, ignored="there is a grammar or there is none."),
            **_GRAMMAR,
            "grammar": Field(Record("an object with syntax and definition", _GRAMMAR), "As chat has it."),
        },
    ),
    "Told to the model with the description; nothing enforces it.",
)
NAME = Plain(
    "a name of up to 128 letters, digits, dots, dashes and underscores",
    {"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,128}$"},
    lambda value: re.fullmatch("[a-zA-Z0-9_.-]{1,128}", value) is not None,
)
ALLOWED_TOOLS = Record(
    "an object with mode and tools",
    {
        "mode": Field(one_of("auto", "required"), required=True),
        "tools": Field(ListOf(OBJECT, "a list of tools"), "Those of the tools that count.", required=True),
    },
)
