"""The steps of the Dockerfile, run as a script in a clean folder, and what a user without an account can do then.

A mount namespace gives the script folders of its own where the image has them. Packages that are here stand in for
the index; what apt installs is this machine's.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tools.render_examples import DEPLOY, rendered

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
UNKNOWN_USER = 48213
PYTHON = "/opt/python"  # where others can read it, which may not hold of this machine's


def can_unshare() -> bool:
    return (
        os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    )


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Each instruction's word and what follows it, lines joined."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", dockerfile))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def environment(steps: list[tuple[str, str]]) -> dict[str, str]:
    """What the image's ENV sets, with PATH before the usual one."""
    values = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    for word, rest in steps:
        if word == "ENV":
            for pair in shlex.split(rest):
                name, _, value = pair.partition("=")
                values[name] = value.replace("$PATH", values["PATH"])
    return values


def script(steps: list[tuple[str, str]], packages: str) -> str:
    """COPY and RUN as commands of a shell that stands in the root of the repository."""
    lines = ["set -eu"]
    for word, rest in steps:
        if word == "COPY":
            *sources, target = rest.split()
            into = target if len(sources) > 1 or target.endswith("/") else str(Path(target).parent)
            lines += [f"mkdir -p {into}", f"cp -r {' '.join(sources)} {into}"]
        elif word == "RUN" and "apt-get" not in rest:
            lines.append(rest)
            if found := re.search(r"-m venv (\S+)", rest):
                version = f"python{sys.version_info.major}.{sys.version_info.minor}"
                own = f"{found[1]}/lib/{version}/site-packages"
                lines += [f"echo {packages} > {own}/here.pth", f"rm -rf {own}/setuptools*"]
    return "\n".join(lines)


def test_the_image_runs_as_no_root_and_says_whether_it_is_ready() -> None:
    steps = instructions(rendered("docker/Dockerfile"))
    last = dict(steps)
    assert last["USER"] == "1000:1000" and last["EXPOSE"] == "8000"
    assert "/ready" in last["HEALTHCHECK"]
    copied = {source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not can_unshare() or not shutil.which("setpriv"), reason="needs root")
def test_its_steps_install_a_command_that_any_user_can_run(tmp_path: Path) -> None:
    steps = instructions(DOCKERFILE.read_text())
    values = environment(steps)
    install = tmp_path / "install.sh"
    install.write_text(script(steps, sysconfig.get_paths()["purelib"]))
    offline = {
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
    }  # pip reads the latter's 0 as "no isolation"
    outside = {**values, **offline, "PATH": f"/opt/qwen3-dist/bin:{PYTHON}/bin:/usr/local/bin:/usr/bin:/bin"}
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", ".*_cache", "tests"),
    )
    homeless = " ".join(f"{name}={shlex.quote(value)}" for name, value in values.items() if name != "HOME")
    as_anyone = f"setpriv --reuid={UNKNOWN_USER} --regid={UNKNOWN_USER} --clear-groups env -i {homeless}"
    checks = f"""
set -eu
for folder in /opt /etc/profile.d /var/cache; do mount -t tmpfs -o mode=755 tmpfs $folder; done
mkdir {PYTHON}
mount --bind {sys.base_prefix} {PYTHON}
cd {source}
bash {install}
cd /var/cache/qwen3-dist
{as_anyone} qwen3-dist --version
{as_anyone} qwen3-dist config --layout tp=2 --changed
{as_anyone} PATH=/usr/bin:/bin bash -lc "which qwen3-dist && python -c 'import serve_app; print(serve_app.__file__)'"
{as_anyone} qwen3-dist generate hello --max-tokens 3 --device cpu
"""
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", checks],
        env=outside,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "layout" in done.stdout and "qwen3-dist 0" in done.stdout
    assert "/opt/qwen3-dist/bin/qwen3-dist" in done.stdout, "a login shell finds the commands"
    assert "/opt/qwen3-dist/lib/" in done.stdout, "the installed package runs, not this tree"
