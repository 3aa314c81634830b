"""Command-line parsers that also accept vLLM's options and report errors in one sentence."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from serve_app.cli import vllm_names

_SWITCH_VALUES = ("true", "false", "null")


class Switch(argparse.Action):
    """A boolean setting: `--name` is true, `--no-name` and `--name false` are false. Stores the value as text."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class VerbParser(Parser):
    """The parser of a verb. It allows no abbreviations, which would read vLLM's `--model` as `--model-name`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})
        self._needed: dict[str, tuple[str, ...]] = {}

    def require_without(self, option: str, *needed: str) -> None:
        """Makes the options `needed` required on command lines without `option`."""
        self._needed[option] = needed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Like ArgumentParser's, but fails on unknown arguments, so that the error names this verb and not the
        program."""
        arguments = list(sys.argv[1:] if args is None else args)
        try:
            arguments = vllm_names.translate(arguments, self._option_string_actions, self._note)
        except vllm_names.ConflictingOptionsError as error:
            self.error(str(error))
        arguments = self._with_switch_values(arguments)
        self._check_required(arguments)
        parsed, rest = super().parse_known_args(arguments, namespace)
        if rest:
            self.error(self._unknown(rest[0]))
        return parsed, rest

    def _note(self, sentence: str) -> None:
        print(f"{self.prog}: {sentence}", file=sys.stderr)

    def _with_switch_values(self, args: Sequence[str]) -> list[str]:
        """`args` with `--name` and `--no-name` of switches written as `--name=true` and `--name=false`."""
        result: list[str] = []
        for place, token in enumerate(args):
            if token == "--":
                return [*result, *args[place:]]
            following = args[place + 1].lower() if place + 1 < len(args) else ""
            if self._is_switch(token) and following not in _SWITCH_VALUES:
                result.append(f"{token}=true")
            elif token not in self._option_string_actions and self._is_switch(
                token.replace("--no-", "--", 1)
            ):
                result.append(f"{token.replace('--no-', '--', 1)}=false")
            else:
                result.append(token)
        return result

    def _is_switch(self, token: str) -> bool:
        return isinstance(self._option_string_actions.get(token), Switch)

    def _check_required(self, args: Iterable[str]) -> None:
        """Fails if required options are missing, and names all of them: ArgumentParser reports groups of alternatives
        separately, after the others."""
        names = {token.partition("=")[0] for token in args}
        groups = [group for group in self._mutually_exclusive_groups if group.required]
        if not groups or names & {"-h", "--help"}:
            return
        single = [[action] for action in self._actions if action.required and action.option_strings]
        single += [
            [self._option_string_actions[name]]
            for option, needed in self._needed.items()
            for name in needed
            if option not in names
        ]
        missing = [
            " or ".join(action.option_strings[-1] for action in actions)
            for actions in [*single, *(group._group_actions for group in groups)]
            if not any(names.intersection(action.option_strings) for action in actions)
        ]
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")

    def _unknown(self, token: str) -> str:
        name = token.partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument {token!r}"
        if advice := vllm_names.advice(name):
            return f"there is no option {name}; {advice}"
        near = difflib.get_close_matches(name, [*self._option_string_actions, *vllm_names.names()], 1)
        return f"there is no option {name}{did_you_mean(near)}"


def did_you_mean(near: Sequence[str]) -> str:
    """The end of an error message that suggests the closest match, if there is one."""
    return f", did you mean {near[0]}?" if near else ""
