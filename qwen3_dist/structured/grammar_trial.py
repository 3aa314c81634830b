"""Tries a grammar in a separate process before the server uses it.

A hostile grammar makes llguidance take minutes or gigabytes, or overflow its stack; in this process that does no harm.
The file is run as a script and imports only llguidance. It reads {"kind", "source"} from stdin and writes {"grammar"}
or {"problem"} to stdout. For the kind "schemas", whose source is a list of schemas, it writes {"problems"}.
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
_STACK = 1 << 20  # bytes; threads of ranks have eight times as much
_STEPS = 64

# Whitespace between JSON tokens. It is limited, since an unsure model would fill its answer with blanks.
WHITESPACE = r"\x20|\n[\x20\t]{0,64}"
_NUMBERED_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//.*|#.*|(<\[)')


def parser_limits() -> LLParserLimits:
    """llguidance's limits for one grammar, here and on ranks: about 15 ms and 100 MB at worst."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=50_000, max_grammar_size=100_000, verbose_errors=False)


class _Bytes:
    """A tokenizer of single bytes, EOS, and the special tokens that a grammar may name."""

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
        raise ValueError("token ids are not allowed in grammars; write <tool_call> or </tool_call>")
    return LLMatcher.grammar_from_lark(source)


def _literal(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z]", lambda char: f"\\x{{{ord(char[0]):x}}}", text)


def _match_random_text(grammar: str) -> str:
    """Matches the start of a random text that `grammar` allows. Returns the error, or ""."""
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
        problem = _match_random_text(grammar)
    except Exception as error:  # noqa: BLE001 - the converters raise errors of many types
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
