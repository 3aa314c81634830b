"""A process of its own in which a grammar is tried out before the server relies on it.

Hostile grammars make the library take minutes, gigabytes or overflow its stack. Here that ends nothing but
this process. It is run as a file, imports nothing but the library, reads {"kind", "source"} from stdin and
writes {"grammar"} or {"problem"} to stdout; of the kind "schemas", a list of them, {"problems"} of each.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLParserLimits

_CPU_S = 2
_MEMORY = 1 << 30
_STACK = 1 << 20  # bytes; ranks follow grammars on stacks of eight times that
_STEPS = 64

# What printers of JSON write: a model that is unsure must not fill its answer with blanks.
WHITESPACE = r"\x20|\n[\x20\t]{0,64}"
_NUMBERED_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//.*|#.*|(<\[)')


def parser_limits() -> LLParserLimits:
    """What the library may spend on one grammar, here and on ranks: about 15 ms and 100 MB at worst."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=50_000, max_grammar_size=100_000, verbose_errors=False)


class _Bytes:
    """A tokenizer of single bytes, with the tokens that a grammar may name; EOS has no name that it could write."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256, 257, 258)
    tokens = tuple(bytes([byte]) for byte in range(256)) + (b"<>", b"<tool_call>", b"</tool_call>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _grammar(kind: str, source: str) -> str:
    from llguidance import LLMatcher, regex_to_lark
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if kind == "json":
        overrides: Any = {"whitespace_pattern": WHITESPACE} if source.lstrip().startswith("{") else None
        return LLMatcher.grammar_from_json_schema(source, overrides=overrides)
    if kind == "regex":
        digits_are_ascii = regex_to_lark(source, "d")
        return LLMatcher.grammar_from_lark(f"start: /{digits_are_ascii}/")
    if kind == "choice":
        return LLMatcher.grammar_from_regex("|".join(map(_literal, json.loads(source))))
    if not re.search(r"^[ \t]*(?:%llguidance\b|start\s*:)", source, re.MULTILINE):
        source = gbnf_to_lark(source)
    if any(match[1] for match in _NUMBERED_TOKEN.finditer(source)):
        raise ValueError("tokens cannot be given by number; write <tool_call> or </tool_call>")
    return LLMatcher.grammar_from_lark(source)


def _literal(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z]", lambda char: f"\\x{{{ord(char[0]):x}}}", text)


def _follow(grammar: str) -> str:
    """What goes wrong along the first steps of one text that `grammar` allows, or ""."""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(_Bytes())), grammar, log_level=0, limits=parser_limits())
    choose = random.Random(0)
    for _ in range(_STEPS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(259) if mask >> token & 1 and token != _Bytes.eos_token_id]
        if matcher.is_error() or not allowed:
            break
        matcher.consume_token(choose.choice(allowed))
    return matcher.get_error() if matcher.is_error() else ""


def _try_out(task: dict[str, str]) -> dict[str, Any]:
    if task["kind"] == "schemas":
        return {"problems": [_problem(json.dumps(schema)) for schema in json.loads(task["source"])]}
    try:
        grammar = _grammar(task["kind"], task["source"])
        problem = _follow(grammar)
    except Exception as error:  # noqa: BLE001 - the converters raise whatever they stumble on
        problem = str(error)
    return {"problem": problem} if problem else {"grammar": grammar}


def _problem(schema: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.validate_grammar(_grammar("json", schema), limits=parser_limits())


def main() -> None:
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    task = json.load(sys.stdin)
    threading.stack_size(_STACK)
    thread = threading.Thread(target=lambda: json.dump(_try_out(task), sys.stdout))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
