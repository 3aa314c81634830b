"""From what a request asks of its text's form to a grammar that ranks can follow; checked and bounded here.

A grammar is text in llguidance's own form, so it travels to the ranks as it is. `grammar_matcher` follows it.
"""

from __future__ import annotations

import json
from typing import Any

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import StructuredOutputs


def compile_grammar(outputs: StructuredOutputs) -> str:
    """The grammar of `outputs`, as text for `Grammars.matcher`.

    Takes milliseconds: call it off the step loop. Raises RequestError for a form that is wrong, too large or
    beyond the library.
    """
    from llguidance import LLMatcher, grammar_from

    try:
        if outputs.json is not None or outputs.json_object:
            schema: Any = {"type": "object"} if outputs.json_object else outputs.json
            grammar = LLMatcher.grammar_from_json_schema(
                schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
            )
        elif outputs.regex is not None:
            grammar = LLMatcher.grammar_from_regex(outputs.regex)
        elif outputs.choice is not None:
            grammar = LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, outputs.choice)))
        else:
            grammar = grammar_from("grammar", outputs.grammar or "")
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(
            f"structured_outputs cannot be used: {error}", param="structured_outputs"
        ) from None
    problem = LLMatcher.validate_grammar(grammar)
    if problem:
        raise RequestError(f"structured_outputs cannot be used: {problem}", param="structured_outputs")
    return str(grammar)
