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
PACKAGES = ("qwen3_dist", "cluster", "serve_app")
FILES = ("py", "h", "cpp", "js", "css", "html")
# Packages and modules, each of which imports only itself and those above it. A module's room is the longest name here
# that fits it; modules of `qwen3_dist` that are not named are values, the first room.
ROOMS = (
    "qwen3_dist",
    "qwen3_dist.protocol",
    "qwen3_dist.text",
    "qwen3_dist.structured",
    "qwen3_dist.ops",
    "qwen3_dist.parallel",
    "qwen3_dist.model",
    "qwen3_dist.weights",
    "qwen3_dist.model.reference",
    "qwen3_dist.worker",
    "qwen3_dist.launch",
    "qwen3_dist.engine",
    "qwen3_dist.llm",
    "qwen3_dist.verify",
    "qwen3_dist.benchmark",
    "cluster",
    "cluster.planning",
    "cluster.calibration",
    "cluster.sweep",
    "cluster.simulation",
    "serve_app.scaling",
    "serve_app.settings",
    "serve_app.failures",
    "serve_app.telemetry",
    "serve_app.apis.shared",
    "serve_app.apis.chat",
    "serve_app.apis.completions",
    "serve_app.apis.tokens",
    "serve_app.apis",
    "serve_app.apis.responses",
    "serve_app.apis.messages",
    "serve_app.apis.error_forms",
    "serve_app.metrics",
    "serve_app.placement",
    "serve_app.request_frames",
    "serve_app.replica_status",
    "serve_app.deployed",
    "serve_app.waiting",
    "serve_app.replica",
    "serve_app.ingress",
    "serve_app.app",
    "serve_app.launch",
    "serve_app.load_client",
    "serve_app.render",
    "serve_app.cli",
    "serve_app",
)
# Rooms and modules that a process without torch or Ray can import.
TORCH_FREE = [
    "errors",
    "config",
    "layout",
    "sampling_params",
    "settings",
    "speculation",
    "lora_adapters",
    "expert_placement",
    "percentiles",
    "quantization",
    "quantization_config",
    "request_terms",
    "step_defaults",
]
TORCH_FREE += ["protocol", "text", "structured"]
TORCH_FREE += [
    f"engine.{name}" for name in ("sequence", "block_manager", "drafts", "scheduler", "request_queue")
]


def modules(package: str) -> list[str]:
    """All modules of a package, by file."""
    files = sorted((ROOT / package).rglob("*.py"))
    return [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files
    ]


EVERYTHING = {name for package in PACKAGES for name in modules(package)}


def file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(module: str) -> set[str]:
    """What `module` imports, anywhere in it: our modules by their whole names, others by their packages'."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file_of(module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & EVERYTHING or {node.module}
    return {name if name in EVERYTHING else name.split(".")[0] for name in names}


def room(module: str) -> int:
    """The place in ROOMS of the room that `module` lies in."""
    fitting = [name for name in ROOMS if module == name or module.startswith(f"{name}.")]
    return ROOMS.index(max(fitting, key=len))


@pytest.mark.parametrize("module", sorted(EVERYTHING - {"qwen3_dist"}))
def test_a_module_imports_only_its_own_room_and_those_above_it(module: str) -> None:
    below = {name for name in imports(module) & EVERYTHING if room(name) > room(module)}
    assert not below, f"{module} imports {below}, which comes after it in ROOMS"


def test_no_file_is_longer_than_a_reader_keeps_in_mind() -> None:
    folders = (*PACKAGES, "tests", "benchmarks", "tools")
    files = [file for folder in folders for end in FILES for file in (ROOT / folder).rglob(f"*.{end}")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert lengths and not {name: lines for name, lines in lengths.items() if lines > 350}


def test_every_room_has_a_module() -> None:
    assert {room(module) for module in EVERYTHING} == set(range(len(ROOMS)))


def test_the_driver_never_touches_a_tensor() -> None:
    assert not {name for name in EVERYTHING if ".engine." in name and "torch" in imports(name)}


def test_ray_is_imported_only_where_ranks_are_placed() -> None:
    users = {module for module in modules("qwen3_dist") if "ray" in imports(module)}
    assert users == {"qwen3_dist.launch.ray_ranks"}


@pytest.mark.parametrize("module", TORCH_FREE)
def test_the_scheduler_and_the_values_need_no_torch(module: str) -> None:
    inner = [name for name in modules("qwen3_dist") if f"{name}.".startswith(f"qwen3_dist.{module}.")]
    code = f"import sys, {', '.join(inner)}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_service_imports_torch_only_where_its_ranks_run() -> None:
    parts = [
        f"serve_app.{name}"
        for name in ("launch.foreground", "app", "ingress.deployment", "replica.deployment")
    ]
    parts += ["qwen3_dist.launch.rank_group", "qwen3_dist.launch.ray_ranks"]  # the executor of a replica
    code = f"import sys, {', '.join(parts)}; sys.exit('torch' in sys.modules)"
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
