"""Finds and sets the GPU of a rank, with errors that say why there is none."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from qwen3_dist.errors import ResourceError
from qwen3_dist.protocol.card import Card

_log = logging.getLogger(__name__)


def set_card(index: int) -> tuple[torch.device, Card]:
    """Makes GPU `index`, of those that this process sees, the current device. Returns the device and its description.

    Raises ResourceError if the GPU cannot be used."""
    if why := why_no_gpu():
        raise ResourceError(f"the rank's process sees no GPU: {why}, or use device=cpu")
    device = torch.device("cuda", index)
    try:
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        raise ResourceError(
            f"torch cannot use GPU {index} ({_first_line(error)}); check it with nvidia-smi, or use device=cpu"
        ) from error
    capability = (properties.major, properties.minor)
    return device, Card(f"GPU-{properties.uuid}", properties.name, capability, total, free)


def local_device(device: str) -> str:
    """Resolves `device` ("auto", "cpu" or "cuda") to "cpu" or "cuda" for ranks of this host.

    Raises ResourceError for "cuda" if torch sees no GPU."""
    if device == "cpu" or torch.cuda.is_available():
        return "cpu" if device == "cpu" else "cuda"
    why = why_no_gpu()
    if device == "cuda":
        raise ResourceError(
            f"device=cuda is set and torch sees no GPU on this host: {why}, or use device=cpu"
        )
    if Path("/dev/nvidiactl").exists():
        _log.warning("torch sees no GPU here, so ranks run on the CPU: %s", why)
    return "cpu"


def why_no_gpu() -> str:
    """Returns why torch sees no GPU in this process and what to change; "" if it sees one."""
    if torch.cuda.is_available():
        return ""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip(" ,").removeprefix("-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides all of them; unset it or name GPUs in it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        if "driver" in str(error).lower():
            return (
                f"the NVIDIA driver does not fit torch {torch.__version__} for CUDA {torch.version.cuda} "
                f"({_first_line(error)}); update the driver or install a torch for an older CUDA"
            )
        return f"{_first_line(error)}; check that nvidia-smi lists GPUs"
    return "there is none; check that nvidia-smi lists GPUs"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
