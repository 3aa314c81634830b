"""Names in the documentation, looked up in the code: `problems` lists those that do not exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from serve_app.cli import build_parser, vllm_names
from serve_app.metrics.definitions import DEFINITIONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = ("qwen3_dist", "cluster", "serve_app", "benchmarks", "tests", "tools")
# Options and classes of other programs that the pages name.
FOREIGN_OPTIONS = {"--head", "--address"}
FOREIGN_NAMES = {
    "OpenAI",
    "ContextWindowExceededError",
    "PromptedOutput",
    "MD_JSON",
    "json_mode",
    "text_editor",
}
FOREIGN_NAMES |= {"Bash", "Infinity", "NaN", "None", "True", "namespace__name", "top_a"}


def snippets(text: str) -> Iterator[str]:
    """Inline code, and each line of code blocks with lines that end in a backslash joined."""
    text = re.sub(r"\\\n\s*", "", text)
    block = False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            block = not block
        elif block or line.startswith("    "):
            yield line.split("  #")[0].strip()
        else:
            yield from re.findall(r"`([^`]+)`", line)


def problems(text: str) -> list[str]:
    """A sentence for each name in `text` that the code does not have."""
    found = []
    for snippet in snippets(text):
        for check in (_paths, _modules, _metrics, _classes, _words, _command_lines, _options, _make, _tests):
            found += check(snippet)
    return found


@cache
def _sources() -> dict[str, ast.Module]:
    """Our modules by dotted name."""
    files = [file for package in OURS for file in (ROOT / package).rglob("*.py")]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            file.read_text()
        )
        for file in files
    }


@cache
def _members(module: str) -> set[str]:
    """Names that a module defines or imports at its top."""
    names: set[str] = set()
    for node in _sources()[module].body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            names |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
            names |= _strings(node)  # of __all__
    return names


def _strings(tree: ast.AST) -> set[str]:
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


@cache
def class_members() -> dict[str, set[str]]:
    """Attributes and methods by name of a class of ours."""
    classes: dict[str, set[str]] = {}
    for tree in _sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                mine = classes.setdefault(node.name, set())
                mine |= {each.name for each in ast.walk(node) if isinstance(each, ast.FunctionDef)}
                mine |= {each.name for each in ast.walk(node) if isinstance(each, ast.AsyncFunctionDef)}
                mine |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
                mine |= {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    return classes


@cache
def _vocabulary() -> set[str]:
    """All words with underscores in our sources, tests of other programs' names included."""
    files = [file for package in OURS for file in (ROOT / package).rglob("*.py")]
    files += [*(ROOT / "benchmarks").rglob("*.json"), *(ROOT / "qwen3_dist/bundled").glob("*.json")]
    files += [ROOT / "Makefile", ROOT / "pyproject.toml"]
    files = [file for file in files if file.name != "tokenizer.json" and file.name != "test_docs.py"]
    return set(re.findall(r"\w*_\w*", "\n".join(file.read_text() for file in files)))


def strings_of_code() -> list[str]:
    """Every string of our packages, with \0 where a value is put in."""
    strings = []
    for name, tree in _sources().items():
        if name.split(".")[0] not in ("qwen3_dist", "cluster", "serve_app"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values]
                strings.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return strings


@cache
def options() -> dict[str, set[str]]:
    """The options of each verb, `--no-` forms of switches included."""
    verbs = next(action for action in build_parser()._actions if isinstance(action.choices, dict))
    known = {}
    for verb, parser in verbs.choices.items():  # type: ignore[union-attr]
        names = set(parser._option_string_actions)
        known[verb] = names | {f"--no-{name.removeprefix('--')}" for name in names} | set(vllm_names.names())
    return known


def _options_of_scripts() -> set[str]:
    text = "\n".join(
        file.read_text() for folder in ("benchmarks", "tools") for file in (ROOT / folder).rglob("*.py")
    )
    return set(re.findall(r'"(--[a-z][a-z-]+)"', text))


def _paths(snippet: str) -> Iterator[str]:
    for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(OURS)}|docs)/[\w./*-]*", snippet):
        if not list(ROOT.glob(path.rstrip("/."))):
            yield f"there is no {path}"


def _modules(snippet: str) -> Iterator[str]:
    for name in re.findall(rf"(?<![\w./-])(?:{'|'.join(OURS)})(?:[.:][A-Za-z_]\w*)+", snippet):
        parts = re.split(r"[.:]", name)
        inside = [n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in _sources()]
        rest = parts[inside[0] :] if inside else parts
        if (ROOT / name).is_file() or name in _metric_names():  # cluster.yaml
            continue
        if not inside or (rest and rest[0] not in _members(".".join(parts[: inside[0]]))):
            yield f"there is no {name}"
    match = re.match(r"from ([\w.]+) import ([\w, ]+)$", snippet)
    if match and match[1].split(".")[0] in OURS:
        for word in match[2].split(", "):
            if match[1] not in _sources() or word not in _members(match[1]):
                yield f"{match[1]} has no {word}"


@cache
def _metric_names() -> set[str]:
    """Metrics as they are named in queries, with and without the endings of their kinds."""
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("", "_bucket", "_count", "_sum")}
    return {each.full_name("vllm") + end for each in DEFINITIONS for end in endings[each.kind]}


def _metrics(snippet: str) -> Iterator[str]:
    for name in re.findall(r"\bvllm:\w+", snippet):
        if name not in _metric_names():
            yield f"there is no metric {name}"


def _classes(snippet: str) -> Iterator[str]:
    match = re.fullmatch(r"([A-Z]\w+)(?:\.(\w+))?(?:\(.*\))?", snippet)
    if not match or match[1] in FOREIGN_NAMES or (match[1].isupper() and match[2] in (None, "md")):
        return
    known = class_members()
    if match[1] not in known and not any(match[1] in _members(module) for module in _sources()):
        yield f"there is no class {match[1]}"
    elif match[2] and match[2] not in known.get(match[1], set()):
        yield f"{match[1]} has no {match[2]}"


def _words(snippet: str) -> Iterator[str]:
    """Names with underscores: settings, parameters, functions, environment variables."""
    match = re.fullmatch(r"([A-Za-z]\w*_\w*)(?:=[^ ]*|: .*)?", snippet)
    known = match and (match[1] in _vocabulary() | FOREIGN_NAMES or match[1].startswith("test_"))
    if match and not known:
        yield f"nothing is called {match[1]}"


def _command_lines(snippet: str) -> Iterator[str]:
    match = re.match(r"qwen3-dist (bench serve|[a-z]+)(.*)", snippet)
    if not match:
        return
    if match[1] not in options():
        yield f"qwen3-dist has no verb {match[1]}"
        return
    for token in shlex.split(match[2], comments=True):
        if token.startswith("--") and token.partition("=")[0] not in options()[match[1]]:
            yield f"qwen3-dist {match[1]} has no option {token}"


def _options(snippet: str) -> Iterator[str]:
    if snippet.startswith("qwen3-dist "):
        return
    known = set().union(*options().values()) | _options_of_scripts() | FOREIGN_OPTIONS
    ours = re.match(r"--|make |python -m benchmarks", snippet)
    for name in re.findall(r"(?<![\w-])--[a-z][a-z-]+", snippet) if ours else ():
        if name not in known:
            yield f"there is no option {name}"


def _make(snippet: str) -> Iterator[str]:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    match = re.match(r"make ([a-z-]+)", snippet)
    if match and match[1] not in verbs:
        yield f"there is no make {match[1]}"


def _tests(snippet: str) -> Iterator[str]:
    match = re.fullmatch(r"(test_\w+)", snippet)
    if match and not any(name.split(".")[-1] == match[1] for name in _sources()):
        yield f"there is no {match[1]}"
