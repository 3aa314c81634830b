"""Runs modules as commands, each in a fork of one process that has imported them: imports cost more than the runs.

`python -m tests.forks MODULE...` reads lines of JSON, `[module, arguments, stdout, stderr]`, of which the last two are
files, and answers each with an exit code. What a module's `prepare` does, if it has one, all forks have.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Forks:
    """A process that has imported `modules`."""

    def __init__(self, *modules: str, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", *modules],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, module: str, *arguments: str) -> str:
        """What `python -m module arguments` prints. Fails with its standard error if it fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            printed, complaints = Path(folder, "out"), Path(folder, "err")
            json.dump([module, arguments, str(printed), str(complaints)], self._process.stdin)
            print(file=self._process.stdin, flush=True)
            code = self._process.stdout.readline().strip()
            assert code == "0", complaints.read_text()[-3000:] if complaints.exists() else f"code {code!r}"
            return printed.read_text()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _fork(module: str, arguments: list[str], printed: str, complaints: str) -> int:
    """The exit code of a process that runs the module's `main`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        for name, descriptor in ((printed, 1), (complaints, 2)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = [module, *arguments]
        importlib.import_module(module).main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    modules = [importlib.import_module(module) for module in sys.argv[1:]]
    for line in sys.stdin:
        while modules:
            getattr(modules.pop(), "prepare", lambda: None)()
        print(_fork(*json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
