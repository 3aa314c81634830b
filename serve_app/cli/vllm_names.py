"""vLLM's options: each is read as our own, or its refusal says what to write here instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator

# What has another name here.
_RENAMED = {
    "--served-model-name": "--model-name",
    "--quantization": "--quantize",
    "-q": "--quantize",
    "--num-gpu-blocks-override": "--num-blocks",
    "--distributed-executor-backend": "--executor",
    "--tool-call-parser": "--tool-calls",
    "--root-path": "--route-prefix",
    "--timeout-graceful-shutdown": "--graceful-shutdown-timeout-s",
}
# What takes no value there and is on or off here.
_SWITCHES = {
    "--enable-prefix-caching": ("--prefix-caching", "true"),
    "--no-enable-prefix-caching": ("--prefix-caching", "false"),
    "--async-scheduling": ("--overlap", "true"),
    "--no-async-scheduling": ("--overlap", "false"),
    "--enforce-eager": ("--cuda-graphs", "false"),
    "--no-enforce-eager": ("--cuda-graphs", "true"),
}
_VALUES = {
    "--dtype": {"half": "float16", "float": "float32"},
    "--load-format": {"dummy": "random", "auto": "checkpoint", "safetensors": "checkpoint"},
    "--executor": {"mp": "processes", "uni": "in_process"},
    "--tool-calls": {"hermes": "json", "qwen3_coder": "xml", "qwen3_xml": "xml"},
}
_AXES = {
    "--tensor-parallel-size": "tp",
    "-tp": "tp",
    "--pipeline-parallel-size": "pp",
    "-pp": "pp",
    "--data-parallel-size": "dp",
    "-dp": "dp",
}
_EXPERT_PARALLEL = ("--enable-expert-parallel", "-ep")
_ALWAYS = "leave it out, since that is always on"
# What has no option here, and what to do about that.
_ELSEWHERE = {
    "--seed": "leave it out and set seed in each request",
    "--tokenizer": "leave it out, since the tokenizer is the checkpoint's",
    "--tokenizer-mode": "leave it out, since the tokenizer is the checkpoint's",
    "--chat-template": "put chat_template.jinja into the checkpoint's directory",
    "--trust-remote-code": "leave it out, since no code of a checkpoint is run",
    "--enable-auto-tool-choice": _ALWAYS,
    "--reasoning-parser": "leave it out, since thoughts are always told apart",
    "--enable-reasoning": _ALWAYS,
    "--enable-chunked-prefill": _ALWAYS,
    "--enable-lora": "leave it out, since --lora NAME=PATH is enough",
    "--lora-modules": "use --lora NAME=PATH, once for each adapter",
    "--speculative-config": "use --speculative, as in --speculative ngram,k=4",
    "--enable-eplb": "use --redundant-experts and --rebalance-experts-s",
    "--kv-cache-memory-bytes": "use --kv-cache-gib",
    "--disable-log-requests": "leave it out, since requests are not logged",
    "--no-enable-log-requests": "leave it out, since requests are not logged",
    "--generation-config": "leave it out, since the checkpoint's is used",
    "--swap-space": "leave it out, since no KV cache is swapped",
    "--config": "use Serve's YAML file with `serve run`",
}
_COUNTS = ("--max-model-len", "--max-num-batched-tokens", "--max-num-seqs")
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmM])")
_FACTORS = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20}


class Refused(Exception):
    """Options that contradict each other, in one sentence."""


def advice(name: str) -> str:
    """What to do where vLLM's option `name` would be given; "" if we know of none."""
    return _ELSEWHERE.get(name, "")


def as_ours(args: list[str], known: Container[str], note: Callable[[str], None]) -> list[str]:
    """`args` with vLLM's options as ours, as far as `known` has these; unknown ones stay as they are.

    Underscores in names are read as dashes, 32k as 32,000 and 32K as 32,768. `note` is told what is read as a layout.
    Raises Refused.
    """
    ours, axes, first = [], {}, ""
    rest = iter(args)
    for token in rest:
        if token == "--":
            ours += [token, *rest]
            break
        name, equals, value = token.partition("=")
        name = _dashed(name, known)
        given = [name + equals + value]
        if name in known:
            given = _with_our_value(name, equals, value, rest)
        elif name == "--model":  # vLLM takes the model so too, our verbs as an argument
            given = [value] if equals else []
        elif name in _AXES and "--layout" in known:
            axes[_AXES[name]] = value if equals else next(rest, "")
            first = first or name
            continue
        elif name in _EXPERT_PARALLEL and "--layout" in known:
            axes["ep"] = ""
            first = first or name
            continue
        elif name in _SWITCHES and _SWITCHES[name][0] in known:
            given = ["=".join(_SWITCHES[name])]
        elif name in _RENAMED and _RENAMED[name] in known:
            given = _with_our_value(_RENAMED[name], equals, value, rest)
        ours += given
    if not axes:
        return ours
    if any(token.partition("=")[0] == "--layout" for token in ours):
        raise Refused(f"{first} is a part of --layout; give --layout alone")
    layout = _layout(axes)
    note(f"{first} is read as --layout {layout}")
    return [*ours, f"--layout={layout}"] if "--" not in ours else [f"--layout={layout}", *ours]


def names() -> Iterator[str]:
    """All names of vLLM that are read as ours or answered with advice."""
    yield from (*_RENAMED, *_SWITCHES, *_AXES, *_EXPERT_PARALLEL, *_ELSEWHERE)


def _dashed(name: str, known: Container[str]) -> str:
    dashed = name.replace("_", "-") if name.startswith("--") else name
    return dashed if dashed in known or dashed in {*names(), "--model"} else name


def _with_our_value(name: str, equals: str, value: str, rest: Iterator[str]) -> list[str]:
    """Option `name` and, if it is one whose values are spelt otherwise there, the value as it is here."""
    if name not in _VALUES and name not in _COUNTS:
        return [name + equals + value]
    given = value if equals else next(rest, None)
    if given is None:
        return [name]
    if name in _COUNTS and (match := _COUNT.fullmatch(given)):
        given = str(int(float(match[1]) * _FACTORS[match[2]]))
    return [f"{name}={_VALUES.get(name, {}).get(given, given)}"]


def _layout(axes: dict[str, str]) -> str:
    """vLLM's sizes as a layout, in which experts are on all ranks of a stage if they are parallel."""
    sizes = {axis: text for axis, text in axes.items() if axis != "ep"}
    for axis, text in sizes.items():
        if not text.isdigit() or int(text) < 1:
            raise Refused(f"the {axis} size must be a positive number, not {text!r}")
    if "ep" in axes:
        sizes["ep"] = str(int(sizes.get("tp", 1)) * int(sizes.get("dp", 1)))
    return ",".join(f"{axis}={sizes[axis]}" for axis in ("tp", "dp", "pp", "ep") if axis in sizes) or "tp=1"
