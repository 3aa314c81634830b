"""Every test file runs in exactly one lane of `make test`, and Ray starts in the first alone."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("tests/**/test_*.py"))
# What starts Ray, and the fixtures of the service that `tests/serve_app/conftest.py` starts.
NEEDS_RAY = re.compile(
    r"ray\.init\(|initialize_head|executor=\"ray\"|ray\.serve\.scripts|\"deploy\", \*where"
    r"|\b(url: str|http: httpx\.Client|client: openai\.OpenAI|service_config: ServiceConfig)\b"
)


@functools.cache
def words(variable: str) -> list[str]:
    """What a variable of the Makefile holds."""
    command = ["make", "--no-print-directory", f"--eval=show: ; @echo $({variable})", "show"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def runs(file: str, variable: str) -> bool:
    """Whether pytest runs the file if it gets the variable's words."""
    named, ignored = False, False
    for word in words(variable):
        place = word.removeprefix("--ignore=")
        if file == place or file.startswith(f"{place}/"):
            named, ignored = named or place == word, ignored or place != word
    return named and not ignored


FIRST_LANE = ("SERVICE_TESTS", "RAY_TESTS")
OTHER_LANES = ("SERVE_APP_TESTS", "RANK_TESTS", "OTHER_TESTS")


@pytest.mark.parametrize("file", FILES)
def test_each_file_runs_once(file: str) -> None:
    variables = (*FIRST_LANE, *OTHER_LANES, "CHECKS", "OF_OTHER_VERBS")
    assert len([variable for variable in variables if runs(file, variable)]) == 1


@pytest.mark.parametrize("variable", ["RAY_TESTS", "RANK_TESTS", "SERVICE_TESTS", "CHECKS", "OF_OTHER_VERBS"])
def test_the_makefile_names_files_that_there_are(variable: str) -> None:
    assert words(variable) and all((ROOT / place).exists() for place in words(variable))


def test_ray_starts_in_the_first_lane_alone() -> None:
    starting = [file for file in FILES if NEEDS_RAY.search((ROOT / file).read_text())]
    assert len(starting) > 20
    assert [file for file in starting if any(runs(file, variable) for variable in OTHER_LANES)] == []
