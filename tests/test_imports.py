"""Who may import whom, and what importing the library costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest

NEEDED = ("torch", "safetensors", "jinja2")  # and tokenizers, of whose requirements none is used
ROOT = Path(__file__).parent.parent
FORBIDDEN = {"qwen3_dist": {"cluster", "serve_app"}, "cluster": {"serve_app"}, "serve_app": set()}
TORCH_FREE = ["errors", "config", "layout", "sampling_params", "settings", "speculation", "adapters"]
TORCH_FREE += [f"engine.{name}" for name in ("plan", "outputs", "sequence", "block_manager", "drafts")]
TORCH_FREE += ["engine.scheduler", "engine.scheduler_limits"]


def imported(file: Path) -> set[str]:
    """Top-level packages that `file` imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_between_packages_go_one_way(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        assert not imported(file) & FORBIDDEN[package], file


def test_ray_is_imported_only_where_ranks_are_placed() -> None:
    users = {file.name for file in (ROOT / "qwen3_dist").rglob("*.py") if "ray" in imported(file)}
    assert users == {"ray_ranks.py"}


@pytest.mark.parametrize("module", TORCH_FREE)
def test_the_scheduler_and_the_values_need_no_torch(module: str) -> None:
    code = f"import sys, qwen3_dist.{module}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def requirements(name: str, found: set[str]) -> set[str]:
    """`name` and all that it requires, as normalised distribution names."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name not in found:
        found.add(name)
        for line in distribution(name).requires or []:
            if "extra ==" not in line and "platform_" not in line:
                requirements(re.match(r"[\w.-]+", line)[0], found)  # type: ignore[index]
    return found


def test_it_generates_with_torch_safetensors_tokenizers_and_jinja2_alone() -> None:
    allowed = {"tokenizers", "qwen3-dist"}
    for name in NEEDED:
        requirements(name, allowed)
    blocked = [
        package
        for package, owners in packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", owner).lower() in allowed for owner in owners)
    ]
    assert {"ray", "huggingface_hub", "tqdm", "transformers", "fastapi"} <= set(blocked)
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
from qwen3_dist import LLM, SamplingParams
with LLM(num_blocks=64) as llm:
    print(llm.chat([dict(role="user", content="Hello!")], SamplingParams(max_tokens=4))[0].text)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_importing_the_library_changes_no_environment_variable() -> None:
    code = (
        "import os; before = dict(os.environ); import sys, qwen3_dist, qwen3_dist.llm, serve_app, cluster; "
    )
    code += "sys.exit(dict(os.environ) != before)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
