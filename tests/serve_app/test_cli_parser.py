"""Command lines as people type them: what is read, and what is refused with what was probably meant."""

from __future__ import annotations

import argparse
import io
import logging
import re
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from qwen3_dist.errors import CheckpointError, ConfigError
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.source import bundled_path, canonical_name, may_be_model, resolve_model
from serve_app.cli import build_parser, generate, main
from serve_app.cli.options import given_settings
from serve_app.ingress.http import make_api
from serve_app.settings import MODEL_PARTS, SERVICE_PARTS, ServiceConfig, read_service_config
from tests.serve_app.command_line import refusal


def parsed(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(arguments)


def engine(*arguments: str) -> EngineConfig:
    return served(*arguments).models[0].replica.engine


def served(*arguments: str) -> ServiceConfig:
    return read_service_config(given_settings(parsed("serve", *arguments), *MODEL_PARTS, *SERVICE_PARTS))


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("qwen3-dist 0.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("serve", "--layuot", "tp=2"),
            "no option --layuot, did you mean --layout?; see qwen3-dist serve --help",
        ),
        (("serve", "--max-modle-len=9"), "did you mean --max-model-len?"),
        (("bench", "latency", "--inputlen", "9"), "did you mean --input-len?; see qwen3-dist bench --help"),
        (("serve", "--tensor-paralel-size", "2"), "did you mean --tensor-parallel-size?"),
        (("serve", "--xyzzy"), "there is no option --xyzzy; see"),
        (("serve", "--mod", "m"), "there is no option --mod"),
        (("serve", "a", "b"), "unexpected argument 'b'"),
        (("srve",), "did you mean serve?"),
        (("dance",), "the verbs are serve, deploy"),
        (("--layout", "tp=2", "serve"), "option --layout comes before the verb"),
        (("serve", "--seed", "1"), "set seed in each request"),
        (("serve", "--reasoning-parser", "qwen3"), "leave it out"),
        (("serve", "--lora-modules", "a=b"), "--lora NAME=PATH"),
        (("serve", "-tp", "2", "--layout", "tp=2"), "-tp is a part of --layout"),
        (("serve", "-tp", "two"), "the tp size must be a positive number, not 'two'"),
        (("serve", "--quantization", "awq"), "quantize must be one of none, int8, fp8, int4"),
        (
            ("plan",),
            "required: --input-len, --output-len, --gpus or --cluster, --concurrency or --rate or --compare; see",
        ),
        (("simulate", "--layout", "tp=2"), "required: --gpus or --cluster; see"),
        (("plan", "--gpus", "8xH100"), "required: --input-len, --output-len, --concurrency or --rate or --"),
        (
            ("plan", "--gpus", "8xH100", "--compare", "r.json", "--rate", "1"),
            "not allowed with argument --compare",
        ),
    ],
)
def test_a_wrong_option_is_refused_with_what_to_write(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in refusal(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "layout"),
    [
        (("--tensor-parallel-size", "2"), "tp=2"),
        (("-tp", "2", "-pp=2"), "tp=2,pp=2"),
        (("--tensor_parallel_size=2", "--data-parallel-size", "2"), "tp=2,dp=2"),
        (("-tp", "2", "-dp", "2", "--enable-expert-parallel"), "tp=2,dp=2,ep=4"),
        (("-ep",), "tp=1"),
    ],
)
def test_parallel_sizes_of_vllm_are_a_layout(arguments: tuple[str, ...], layout: str) -> None:
    assert engine(*arguments).layout == engine("--layout", layout).layout


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("--served-model-name", "m"), ("--model-name", "m")),
        (("--served_model_name=m",), ("--model-name", "m")),
        (("--quantization", "int8"), ("--quantize", "int8")),
        (("--dtype", "half"), ("--dtype", "float16")),
        (("--load-format", "dummy"), ("--load-format", "random")),
        (("--distributed-executor-backend", "mp"), ("--executor", "processes")),
        (("--tool-call-parser", "hermes"), ("--tool-calls", "json")),
        (("--enable-prefix-caching",), ("--prefix-caching", "true")),
        (("--no-enable-prefix-caching",), ("--prefix-caching", "false")),
        (("--no-prefix-caching",), ("--prefix-caching", "false")),
        (("--enforce-eager",), ("--cuda-graphs", "false")),
        (("--max-model-len", "4k"), ("--max-model-len", "4000")),
        (("--max-num-batched-tokens=2K",), ("--max-num-batched-tokens", "2048")),
        (("--api-server-count", "4"), ("--ingress-replicas", "4")),
        (("--api_server_count=4",), ("--ingress-replicas", "4")),
        (("-asc", "4"), ("--ingress-replicas", "4")),
        (("--gpu_memory_utilization", "0.5"), ("--gpu-memory-utilization", "0.5")),
    ],
)
def test_options_of_vllm_are_read_as_ours(theirs: tuple[str, ...], ours: tuple[str, ...]) -> None:
    assert served(*theirs) == served(*ours)


def test_a_switch_needs_no_value_and_takes_no_model_for_one() -> None:
    assert parsed("serve", "--share-gpus", "DIR").model == "DIR"
    assert engine("--share-gpus").share_gpus
    assert not engine("--share-gpus", "false").share_gpus


def test_the_model_may_be_given_as_an_option_and_after_others() -> None:
    for arguments in (("--model", "DIR"), ("--model=DIR",), ("--port", "9", "DIR")):
        given = parsed("serve", *arguments)
        assert given.model == "DIR" and not hasattr(given, "model_name")


def test_what_an_option_takes_is_not_read_as_an_option_of_vllm() -> None:
    assert parsed("generate", "--prompt", "--dtype half").prompts == ["--dtype half"]


def test_no_help_shows_python(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("serve", "generate", "bench", "plan", "simulate", "sweep", "inspect", "calibrate"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert "None" not in capsys.readouterr().out


def test_names_of_models_are_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("bundled") == resolve_model("") == bundled_path()
    assert resolve_model(str(bundled_path() / "config.json")) == bundled_path()
    assert canonical_name("Qwen3-8B") == "Qwen/Qwen3-8B"
    assert read_service_config({"model": "bundled"}).models[0].name == "qwen3-bundled"
    assert read_service_config({"model": "Qwen3-8B"}).models[0].name == "Qwen/Qwen3-8B"
    (tmp_path / "Qwen3-8B").mkdir()
    assert canonical_name("Qwen3-8B") == "Qwen3-8B"
    (tmp_path / "other.json").touch()
    with pytest.raises(CheckpointError, match="other.json is a file; give the directory"):
        resolve_model("other.json")


@pytest.mark.parametrize(
    ("text", "is_model"),
    [
        ("bundled", True), ("Qwen3-8B", True), ("Qwen/Qwen3-8B", True), ("/no/such", True), ("./x", True),
        ("Hello there", False), ("Hello", False), ("", False), ("a/b/c", False), ("1+1=?", False),
    ],
)  # fmt: skip
def test_a_text_is_told_from_a_model(text: str, is_model: bool) -> None:
    assert may_be_model(text) is is_model


@pytest.mark.parametrize("verb", ["inspect", "plan", "simulate"])
def test_a_verb_without_weights_takes_any_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str
) -> None:
    config = tmp_path / "shape.json"
    config.write_text((bundled_path() / "config.json").read_text())
    load = ("--input-len", "9", "--output-len", "9")
    more = {
        "inspect": (),
        "plan": ("--gpus", "2xH100", "--concurrency", "1", *load),
        "simulate": ("--gpus", "2xH100", "--rate", "1", "--duration", "2", *load),
    }[verb]
    shown = []
    for name in ("bundled", str(bundled_path()), str(config), "qwen3-0.6b", "Qwen/Qwen3-0.6B"):
        assert main([verb, name, *more]) == 0
        shown.append(capsys.readouterr().out)
        assert "None" not in shown[-1]
    assert shown[3].splitlines()[0] == shown[4].splitlines()[0]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("arguments", "stdin", "model", "prompts"),
    [
        (("Hello there",), "", "", ["Hello there"]),
        (("bundled", "Hello"), "", "bundled", ["Hello"]),
        (("Hello",), "not read", "", ["Hello"]),
        (("bundled", "--prompt", "a", "--prompt-ids", "1,2"), "not read", "bundled", ["a", [1, 2]]),
        (("no-model", "--prompt", "a"), "", "no-model", ["a"]),
        ((), "from a pipe\n", "", ["from a pipe"]),
        (("Qwen3-8B",), "two\nlines\n", "Qwen3-8B", ["two\nlines"]),
    ],
)
def test_prompts_come_from_options_an_argument_or_standard_input(
    arguments: tuple[str, ...], stdin: str, model: str, prompts: list[object]
) -> None:
    given = parsed("generate", *arguments)
    assert generate._model_and_prompts(given, io.StringIO(stdin)) == (model, prompts)


@pytest.mark.parametrize("stdin", [io.StringIO(""), _Terminal("waits for a key"), None])
def test_without_a_prompt_generate_waits_for_nobody(stdin: io.StringIO | None) -> None:
    with pytest.raises(ConfigError, match="there is no prompt; give a text, --prompt"):
        generate._model_and_prompts(parsed("generate", "bundled"), stdin)


def test_a_layout_of_several_ranks_in_one_process_is_refused_by_the_settings_alone() -> None:
    with pytest.raises(ConfigError, match="in_process runs one rank and layout tp=2 has more"):
        EngineConfig(executor="in_process", layout="tp=2")  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", [("generate", "--prompt", "hi"), ("serve",)])
def test_a_gpu_that_torch_cannot_use_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "is built without CUDA" in refusal(capsys, *verb, "--device", "cuda")


def test_the_docs_page_loads_nothing_from_elsewhere() -> None:
    api = make_api(lambda request: None)
    with TestClient(api) as client:
        for page in ("/docs", "/redoc"):
            text = client.get(page).text
            loaded = re.findall(r"(?:src|href)=\"([^\"]+)", text)
            assert loaded and "://" not in " ".join(loaded)
            assert all(client.get(path).status_code == 200 for path in loaded)
        assert client.get("/openapi.json").status_code == 200


def test_warnings_of_ours_begin_like_our_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["config", "--changed"]) == 0
    logging.getLogger("qwen3_dist.launch.ray_ranks").warning("%d ranks share cores", 2)
    assert capsys.readouterr().err == "qwen3-dist: 2 ranks share cores\n"
