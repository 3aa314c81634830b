"""The page's files: all are served and in a wheel, nothing comes from another host, and no text becomes HTML."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from serve_app.ingress.http import make_api
from serve_app.ingress.page import FOLDER
from tests.serve_app.gate import access

ROOT = Path(__file__).parents[2]
FILES = sorted(FOLDER.iterdir())
SCRIPTS = [file for file in FILES if file.suffix == ".js"]
INDEX = FOLDER / "index.html"
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".html": "text/html"}


def client(root_path: str = "") -> TestClient:
    return TestClient(make_api(access(api_key="key").check), root_path=root_path)


def loaded() -> set[str]:
    """Every path that the page loads, from its HTML and from the imports of its scripts."""
    paths = set(re.findall(r'(?:src|href)="([^"#]+)"', INDEX.read_text()))
    for script in SCRIPTS:
        paths |= {f"page/{name}" for name in re.findall(r'from "\./([^"]+)"', script.read_text())}
    return paths


@pytest.mark.parametrize("prefix", ["", "/small"])
def test_the_page_and_all_that_it_loads_come_without_a_key(prefix: str) -> None:
    asked = client(prefix)
    assert loaded() == {f"page/{file.name}" for file in FILES} - {"page/index.html"}
    for path in ("", *loaded()):
        answer = asked.get(f"{prefix}/{path}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(TYPES[Path(path).suffix or ".html"])
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert asked.get(f"{prefix}/").content == INDEX.read_bytes()
    assert asked.get(f"{prefix}/v1/models").status_code == 401


def test_a_prefix_without_a_slash_leads_to_the_page_so_that_its_paths_hold() -> None:
    answer = client("/small").get("/small", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"].endswith("/small/")) == (307, True)


def test_a_file_that_the_browser_has_is_not_sent_again() -> None:
    first = client().get("/page/page.css")
    assert first.headers["cache-control"] == "no-cache"
    for known in (first.headers["etag"], f'"x", W/{first.headers["etag"]}'):
        again = client().get("/page/page.css", headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert client().get("/page/page.css", headers={"if-none-match": '"x"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["x.js", "..%2fsettings.py", "%2e%2e/settings.py", "../settings.py", "", "a/b.js"]
)
def test_nothing_but_the_pages_files_is_served(path: str) -> None:
    answer = client().get(f"/page/{path}", headers={"x-api-key": "key"})
    assert answer.status_code == 404 and b"ServiceConfig" not in answer.content


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_names_no_other_host_and_makes_no_html_of_text(file: Path) -> None:
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"https?:|[\"'(]//", text)
    assert not re.findall(
        r"(?:inner|outer)HTML|insertAdjacent|document\.write|\beval\(|new Function|srcdoc", text
    )
    if file.suffix == ".html":  # the policy forbids inline scripts, styles and handlers
        assert not re.findall(r"<script(?![^>]* src=)|<style|\bstyle=|\bon\w+=", text)


def test_scripts_import_only_what_others_export() -> None:
    exported = {
        script.name: set(
            re.findall(r"^export (?:async )?(?:function\*?|const|class) (\w+)", script.read_text(), re.M)
        )
        for script in SCRIPTS
    }
    for script in SCRIPTS:
        for names, name in re.findall(r'^import \{([^}]+)\} from "\./([^"]+)"', script.read_text(), re.M):
            assert {each.strip() for each in names.split(",")} <= exported[name], f"{script.name}: {name}"


def test_scripts_use_only_elements_that_the_page_has() -> None:
    ids = set(re.findall(r'\bid="([^"]+)"', INDEX.read_text()))
    for script in SCRIPTS:
        assert set(re.findall(r'byId\("([^"]+)"\)', script.read_text())) <= ids, script.name


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
def test_scripts_parse(tmp_path: Path) -> None:
    for script in SCRIPTS:
        module = tmp_path / f"{script.stem}.mjs"
        module.write_text(script.read_text())
        done = subprocess.run(["node", "--check", str(module)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_wheel_has_the_page(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "serve_app", source / "serve_app", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"serve_app/page/{file.name}" for file in FILES} <= set(names)
