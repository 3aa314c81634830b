"""vLLM's options: translated to our own, or refused with advice on what to use instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator

# vLLM's name: our name.
_RENAMED = {
    "--served-model-name": "--model-name",
    "--quantization": "--quantize",
    "-q": "--quantize",
    "--num-gpu-blocks-override": "--num-blocks",
    "--distributed-executor-backend": "--executor",
    "--tool-call-parser": "--tool-calls",
    "--root-path": "--route-prefix",
    "--allowed-origins": "--cors-allow-origins",
    "--timeout-graceful-shutdown": "--graceful-shutdown-timeout-s",
    "--api-server-count": "--ingress-replicas",
    "-asc": "--ingress-replicas",
}
# vLLM's flags: our boolean setting and its value.
_SWITCHES = {
    "--enable-prefix-caching": ("--prefix-caching", "true"),
    "--no-enable-prefix-caching": ("--prefix-caching", "false"),
    "--async-scheduling": ("--overlap", "true"),
    "--no-async-scheduling": ("--overlap", "false"),
    "--enforce-eager": ("--cuda-graphs", "false"),
    "--no-enforce-eager": ("--cuda-graphs", "true"),
    "--enable-log-requests": ("--log-requests", "true"),
    "--no-enable-log-requests": ("--log-requests", "false"),
    "--disable-log-requests": ("--log-requests", "false"),
}
# Our option: vLLM's values and ours.
_VALUES = {
    "--dtype": {"half": "float16", "float": "float32"},
    "--load-format": {"dummy": "random", "auto": "checkpoint", "safetensors": "checkpoint"},
    "--cors-allow-origins": {'["*"]': "*"},
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
# Options that have no counterpart, and what to do instead.
_ADVICE = {
    "--seed": "leave it out and set seed in each request",
    "--tokenizer": "leave it out, since the tokenizer is the checkpoint's",
    "--base-url": "give the URL as the argument",
    "--tokenizer-mode": "leave it out, since the tokenizer is the checkpoint's",
    "--chat-template": "put chat_template.jinja into the checkpoint's directory",
    "--trust-remote-code": "leave it out, since no code of a checkpoint is run",
    "--enable-auto-tool-choice": _ALWAYS,
    "--reasoning-parser": "leave it out, since reasoning is always parsed",
    "--enable-reasoning": _ALWAYS,
    "--enable-chunked-prefill": _ALWAYS,
    "--enable-lora": "leave it out, since --lora NAME=PATH is enough",
    "--lora-modules": "use --lora NAME=PATH, once for each adapter",
    "--speculative-config": "use --speculative, as in --speculative ngram,k=4",
    "--enable-eplb": "use --redundant-experts and --rebalance-experts-s",
    "--kv-cache-memory-bytes": "use --kv-cache-gib",
    "--generation-config": "leave it out, since the checkpoint's is used",
    "--rope-scaling": "use --hf-overrides, as in --hf-overrides '{\"rope_scaling\": {...}}'",
    "--rope-theta": "use --hf-overrides, as in --hf-overrides '{\"rope_theta\": 1000000}'",
    "--swap-space": "leave it out, since no KV cache is swapped",
}
_COUNTS = ("--max-model-len", "--max-num-batched-tokens", "--max-num-seqs")
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmM])")
_FACTORS = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20}


class ConflictingOptionsError(Exception):
    """Options that contradict each other, or a size that is not a positive number."""


def advice(name: str) -> str:
    """What to do instead of giving vLLM's option `name`; "" if there is no advice."""
    return _ADVICE.get(name, "")


def instead_of(setting: str) -> str:
    """What a file says in place of vLLM's `setting`, such as tensor_parallel_size; "" for all other names."""
    name = "--" + setting.replace("_", "-")
    if name in _AXES:
        return f"write layout: {_AXES[name]}=N"
    if name in _EXPERT_PARALLEL:
        return "write the expert-parallel size into the layout, as in layout: tp=N,ep=N"
    if name in _RENAMED:
        return f"write {_setting(_RENAMED[name])}"
    if name in _SWITCHES:
        ours, value = _SWITCHES[name]
        return f"write {_setting(ours)}: {value}"
    return advice(name)


def translate(args: list[str], known: Container[str], note: Callable[[str], None]) -> list[str]:
    """Translates vLLM's options in `args` to ours, if `known` has our option; leaves all others as they are.

    Underscores in names become dashes, 32k becomes 32000 and 32K 32768. Parallel sizes become one --layout, about
    which `note` gets a sentence. Raises ConflictingOptionsError.
    """
    ours, axes, first = [], {}, ""
    rest = iter(args)
    for token in rest:
        if token == "--":
            ours += [token, *rest]
            break
        name, equals, value = token.partition("=")
        name = _with_dashes(name, known)
        translated = [name + equals + value]
        if name in known:
            translated = _translate_value(name, equals, value, rest)
        elif name == "--model":  # our verbs take the model as an argument
            translated = [value] if equals else []
        elif name in _AXES and "--layout" in known:
            axes[_AXES[name]] = value if equals else next(rest, "")
            first = first or name
            continue
        elif name in _EXPERT_PARALLEL and "--layout" in known:
            axes["ep"] = ""
            first = first or name
            continue
        elif name in _SWITCHES and _SWITCHES[name][0] in known:
            translated = ["=".join(_SWITCHES[name])]
        elif name in _RENAMED and _RENAMED[name] in known:
            translated = _translate_value(_RENAMED[name], equals, value, rest)
        ours += translated
    if not axes:
        return ours
    if any(token.partition("=")[0] == "--layout" for token in ours):
        raise ConflictingOptionsError(f"{first} is a part of --layout; give --layout alone")
    layout = _layout(axes)
    note(f"{first} is read as --layout {layout}")
    return [*ours, f"--layout={layout}"] if "--" not in ours else [f"--layout={layout}", *ours]


def names() -> Iterator[str]:
    """All option names of vLLM that are translated or answered with advice."""
    yield from (*_RENAMED, *_SWITCHES, *_AXES, *_EXPERT_PARALLEL, *_ADVICE)


def _setting(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _with_dashes(name: str, known: Container[str]) -> str:
    dashed = name.replace("_", "-") if name.startswith("--") else name
    return dashed if dashed in known or dashed in {*names(), "--model"} else name


def _translate_value(name: str, equals: str, value: str, rest: Iterator[str]) -> list[str]:
    """Our option `name` with its value translated; takes the value from `rest` if `equals` is empty."""
    if name not in _VALUES and name not in _COUNTS:
        return [name + equals + value]
    text = value if equals else next(rest, None)
    if text is None:
        return [name]
    if name in _COUNTS and (match := _COUNT.fullmatch(text)):
        text = str(int(float(match[1]) * _FACTORS[match[2]]))
    return [f"{name}={_VALUES.get(name, {}).get(text, text)}"]


def _layout(axes: dict[str, str]) -> str:
    """vLLM's parallel sizes as a layout. With expert parallelism ep covers all ranks of a stage, as in vLLM."""
    sizes = {axis: text for axis, text in axes.items() if axis != "ep"}
    for axis, text in sizes.items():
        if not text.isdigit() or int(text) < 1:
            raise ConflictingOptionsError(f"the {axis} size must be a positive number, not {text!r}")
    if "ep" in axes:
        sizes["ep"] = str(int(sizes.get("tp", 1)) * int(sizes.get("dp", 1)))
    return ",".join(f"{axis}={sizes[axis]}" for axis in ("tp", "dp", "pp", "ep") if axis in sizes) or "tp=1"
