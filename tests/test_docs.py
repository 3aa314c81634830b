"""The documentation is true of the code: names exist, settings and routes are described, links and pictures hold."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.settings import read_service_config
from tests.documents import PAGES, ROOT, problems, strings_of_code

DOCS = ROOT / "docs"
# What a reader stumbles over; each was in messages or pages once.
AWKWARD = (
    "is no positive",
    "is no YAML",
    "is no JSON",
    "who finds no",
    "is no number",
    "garbage",
    "nobody here",
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_in_the_documentation_exists(page: Path) -> None:
    assert not problems(page.read_text())


@pytest.mark.parametrize(
    "wrong",
    [
        "`qwen3_dist.engine.schedular`",
        "`serve_app.app:make_app`",
        "`qwen3_dist/engine/no_such_file.py`",
        "`EngineConfiguration`",
        "`LLM.expert_loads`",
        "`max_num_sequences_of_all`",
        "`--max-num-sequences`",
        "    qwen3-dist launch bundled",
        "    qwen3-dist serve bundled \\\n        --layouts tp=2",
        "`make everything`",
        "`vllm:prompt_tokens`",
        "`qwen3_dist:no_such_metric`",
        "`test_that_never_was`",
        "```python\nfrom qwen3_dist import LLMs\n```",
    ],
)
def test_a_wrong_name_is_found(wrong: str) -> None:
    assert problems(wrong)


def test_the_page_of_settings_is_what_the_dataclasses_say() -> None:
    made = subprocess.run(
        [sys.executable, "tools/settings_page.py"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == (DOCS / "settings.md").read_text(), "run `make docs`"


def routes() -> set[str]:
    """METHOD /path of every route that the service's own page shows."""
    from serve_app.ingress.deployment import api

    paths = api.openapi()["paths"]
    return {
        re.sub(r"\{\w+(:path)?\}", "{id}", f"{method.upper()} {path}")
        for path in paths
        for method in paths[path]
    }


def test_every_route_is_documented_and_every_documented_route_exists() -> None:
    table = (DOCS / "api.md").read_text()
    assert set(re.findall(r"`((?:GET|POST|DELETE) /[^`]*)`", table)) - {"GET /docs"} == routes()
    everywhere = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"`(?:GET |POST |DELETE )?(/v1/[^`?]*)`", everywhere))
    known = {route.split()[1] for route in routes()}
    assert not {name for name in named if re.sub(r"\{\w+\}", "{id}", name) not in known}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_of_a_service_is_accepted(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        content = yaml.safe_load(block)
        for application in content.get("applications", []):
            read_service_config(application["args"])
        if content.keys() & {"model", "models"}:
            read_service_config(content)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the builder and GitHub make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    """The builder checks links between pages of docs/; this also those of README and CONTRIBUTING, and pictures."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def listed(nav: list[dict[str, Any]]) -> list[str]:
    flat = []
    for entry in nav:
        for value in entry.values():
            flat += [value] if isinstance(value, str) else listed(value)
    return flat


def test_the_navigation_lists_every_page_once() -> None:
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert sorted(listed(nav)) == sorted(page.name for page in DOCS.glob("*.md"))


def test_messages_in_troubleshooting_are_the_codes_own() -> None:
    messages = re.findall(r"^    (.+)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    strings = strings_of_code()
    assert len(messages) >= 15
    for message in messages:
        parts = [re.escape(part) for part in message.split("…")]
        pattern = re.compile(r"[^a-z]*?\0[^a-z]*?".join(parts))
        told = [text for text in strings if pattern.fullmatch(text)]
        assert told, f"no message of the code reads: {message}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_plain(page: Path) -> None:
    """No awkward phrase, no table cell with two ranges of numbers, no bullet over five lines."""
    text = page.read_text()
    assert not [phrase for phrase in AWKWARD if phrase in text]
    for line in text.split("\n"):
        cells = line.split("|") if line.startswith("|") else []
        assert not [cell for cell in cells if len(re.findall(r"\d to \d", cell)) > 1], line
    for bullet in re.findall(r"^[-*] .*(?:\n {2,}\S.*)*", text, re.MULTILINE):
        assert bullet.count("\n") < 5, bullet
