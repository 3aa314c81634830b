"""The usual mistakes in YAML files, each as a place and a piece of advice on what to change."""

from __future__ import annotations

import re

import yaml

_NO_SPACE = re.compile(r"(\s*(?:- *)?\{?\s*[A-Za-z_][\w-]*):(?=[^\s:/])")
_SPECIAL = re.compile(r"found character '([@%`])'")
_OPENED = {"while parsing a flow sequence": "[", "while parsing a flow mapping": "{"}

Place = tuple[int, int]  # line and column, from 1 on


def explain(error: yaml.YAMLError, text: str) -> tuple[Place, str]:
    """Where the mistake is that `error` of parsing `text` reports, and what to change."""
    lines = text.splitlines()
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        place = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        return place, f"remove the control character U+{ord(text[error.position]):04X}"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return (1, 1), f"it cannot be parsed ({error})"
    problem, context = error.problem or "", error.context or ""
    here = _place(error.problem_mark)
    began = _place(error.context_mark) if error.context_mark is not None else here
    if "'\\t'" in problem:
        return here, "put spaces in place of the tab"
    if (glued := _without_space(lines, began[0], here[0])) is not None:
        return glued, "put a space after the colon"
    if "could not find expected ':'" in problem:
        return began, "write `name: value`, with a colon and a space"
    if "mapping values are not allowed" in problem:
        if ": " in lines[here[0] - 1][: here[1] - 1]:
            return here, "put quotes around the value that has a colon in it"
        return here, "indent the line as far as the one above"
    if "quoted scalar" in context and "end of stream" in problem:
        return began, "close the quote that begins here"
    if "unknown escape" in problem:
        return here, "use single quotes, in which a backslash is a plain character"
    if bracket := _OPENED.get(context):
        closing = {"[": "]", "{": "}"}[bracket]
        return began, f"close the {bracket} that begins here with {closing}, and put commas between its parts"
    if found := _SPECIAL.search(problem):
        return here, f"put quotes around the value that begins with {found[1]}"
    if "alias" in context + problem or "anchor" in context + problem:
        return began, "put quotes around the value that begins with * or &"
    if "another document" in problem:
        return here, "keep one document, without a line of three dashes in the middle"
    if "'<scalar>'" in problem:
        return here, "put quotes around the whole value"
    if "found '}'" in problem or "found ']'" in problem:
        return here, "remove the bracket that closes nothing"
    if "expected <block end>" in problem:
        return here, "indent the line as far as the others of its mapping or list"
    return here, f"{context}, {problem}".removeprefix(", ")


def glued_colon(text: str) -> Place | None:
    """The place of the first colon that lacks a space after it, in a file of names and values; None if there is
    none."""
    return _without_space(text.splitlines(), 1, 1)


def _without_space(lines: list[str], first: int, last: int) -> Place | None:
    """The colon without a space behind it in lines `first` to `last`, or in the last one with text above them."""
    above = next((number for number in range(first - 1, 0, -1) if lines[number - 1].strip()), first)
    for number in (*range(first, last + 1), above):
        if number <= len(lines) and (match := _NO_SPACE.match(lines[number - 1])):
            return number, match.end()
    return None


def _place(mark: yaml.error.Mark) -> Place:
    return mark.line + 1, mark.column + 1
