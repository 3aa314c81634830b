"""Writes the examples in `cluster/deploy/` anew: what `qwen3-dist render` makes of the configs in its `services/`."""

from __future__ import annotations

import contextlib
import io
import shlex
from pathlib import Path

from serve_app.cli import main

DEPLOY = Path(__file__).parent.parent / "cluster" / "deploy"
# What makes each file, with its config's path below DEPLOY.
EXAMPLES = {
    "kuberay/one-node.yaml": "kuberay --config services/one-node.yaml --secret-env huggingface",
    "kuberay/two-nodes.yaml": "kuberay --config services/two-nodes.yaml --checkpoint-claim checkpoints "
    "--gpu-type NVIDIA-H100-80GB-HBM3",
    "kuberay/incremental.yaml": "kuberay --config services/one-node.yaml --secret-env huggingface "
    "--gpus-per-node 4 --upgrade incremental",
    "slurm/two-nodes.sbatch": "slurm --config services/two-nodes.yaml",
    "docker/Dockerfile": "docker",
    "compose/compose.yaml": "compose --config services/laptop.yaml",
    "systemd/qwen3-dist.service": "systemd --config services/one-node.yaml",
}


def rendered(example: str) -> str:
    """What `example`, a key of EXAMPLES, should hold."""
    arguments = [
        str(DEPLOY / word) if word.startswith("services/") else word
        for word in shlex.split(EXAMPLES[example])
    ]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["render", *arguments])
    if code:
        raise SystemExit(code)
    return out.getvalue()


if __name__ == "__main__":
    for name in EXAMPLES:
        (DEPLOY / name).write_text(rendered(name))
