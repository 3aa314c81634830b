"""`make gpu-check`: stages in processes of their own, what is written after each, and the verdict."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch

from benchmarks import record
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import codes, experts
from benchmarks.gpu_check.check import CheckFailed, Setting
from benchmarks.gpu_check.report import Check, StageReport, exit_code, verdict
from benchmarks.gpu_check.supervisor import Stage, run_stage
from qwen3_dist.ops.cuda.attention import PLAIN, Chosen
from qwen3_dist.ops.cuda.kernels import GpuKernels
from qwen3_dist.ops.cuda.ops import CudaOps
from tests.ranks import ROOT

PLANTED = Stage("planted", "tests.planted_stage", 10, 10, "mend what was planted.")
STAGES = {stage.name: stage for stage in gpu_check.STAGES}


def outcomes(report: StageReport) -> dict[str, str]:
    return {check.name: check.outcome for check in report.checks}


def report(name: str, *checks: Check, ended: str = "") -> StageReport:
    return StageReport(name, f"advice on {name}.", 3.0, 10.0, checks, ended)


def test_a_check_that_fails_keeps_no_other_from_running(tmp_path: Path) -> None:
    stages = [run_stage(PLANTED, "cpu", tmp_path, only=words) for words in ("s", "no time")]
    assert outcomes(stages[1]) == {"has no time": "left out"}
    assert stages[1].status == "unfinished"
    told = {check.name: check for check in stages[0].checks}
    assert told["fails"].why == "2 tokens of 5 differ" and told["fails"].figures == {"tokens": 5}
    assert told["raises"].why == "ZeroDivisionError: division by zero"
    assert "1 / 0" in told["raises"].figures["traceback"]
    assert (told["is skipped"].outcome, told["is skipped"].why) == ("skipped", "there is one card")


def test_a_stage_that_hangs_is_ended_with_its_children_and_keeps_what_it_had(tmp_path: Path) -> None:
    ended = run_stage(PLANTED, "cpu", tmp_path)
    assert ended.status == "failed" and ended.ended.endswith("at its time limit of 10 s in 'no end'")
    assert outcomes(ended)["passes"] == "passed" and outcomes(ended)["no end"] == "failed"
    assert "a fault" not in outcomes(ended)
    assert "_hangs" in ended.stderr, "where the stage hung is not told"
    status = Path(f"/proc/{ended.checks[0].figures['child']}/stat")
    assert not status.exists() or ") Z " in status.read_text()


def test_a_stage_whose_process_dies_names_the_check_and_the_signal(tmp_path: Path) -> None:
    ended = run_stage(PLANTED, "cpu", tmp_path, only="a fault")
    assert ended.ended == "its process ended by SIGSEGV in 'a fault'" and ended.status == "failed"


def test_a_stage_whose_process_ends_early_has_failed_although_its_code_is_0(tmp_path: Path) -> None:
    ended = run_stage(PLANTED, "cpu", tmp_path, only="an early end")
    assert ended.ended == "its process ended with code 0 in 'an early end'" and ended.status == "failed"


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("parity", "moe, tp=2,ep=2, bfloat16"),
        ("codes", "fp8, moe, tp=2,ep=2"),
        ("faults", "a rank runs out of memory"),
        ("faults", "a killed rank is replaced"),
    ],
)
def test_a_stage_runs_on_a_cpu(stage: str, words: str, tmp_path: Path) -> None:
    done = run_stage(STAGES[stage], "cpu", tmp_path, only=words)
    assert outcomes(done) == {words: "passed"} and not done.ended, done


def test_each_way_of_a_gpu_computes_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's interpreter, which multiplies the bits of bf16."""
    monkeypatch.setattr(experts, "_gpu_kernels", lambda _: GpuKernels())
    monkeypatch.setattr(experts, "microseconds", lambda run, setting: 7.0)
    setting, size, times = Setting("cpu", tmp_path, 1), experts._Size(4, 2, 32, 16, torch.float16), {}
    figures = experts._ways(setting, size, 3, times)
    assert figures == {f"{way}, us": 7.0 for way in ("one by one", "triton", "triton, int8")}
    assert experts._crossing(size, {"triton": {8: 1.0, 64: 3.0}, "grouped_mm": {8: 2.0, 64: 2.0}}) == {
        "few_pairs_now": 256,
        "measured": 32.0,
    }
    wrong = GpuKernels()
    monkeypatch.setattr(wrong, "experts", lambda x, *_: 2 * x)
    monkeypatch.setattr(experts, "_gpu_kernels", lambda _: wrong)
    with pytest.raises(CheckFailed, match="triton has a relative error of"):
        experts._ways(setting, size, 3, times)


def test_products_with_codes_are_compared_with_plain_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Triton's interpreter, which multiplies the bits of bf16."""
    torch.manual_seed(0)  # of other numbers the error may be 0.0199
    monkeypatch.setattr(codes, "microseconds", lambda run, setting: 7.0)
    monkeypatch.setattr(codes, "_DTYPE", torch.float16)
    kernels, cpu, setting = GpuKernels(), torch.device("cpu"), Setting("cpu", tmp_path, 1)
    by_dtype = dict.fromkeys((torch.float16, torch.float32), kernels)
    ops = CudaOps(cpu, torch.float16, by_dtype, Chosen(PLAIN, ()), grouped_mm=False)
    sizes = codes._Sizes(((24, 48),), 2, 1, 32, 16)
    for form in codes._FORMS.values():
        figures = codes._products(setting, ops, form, 24, 48, (1, 3))
        assert figures == {f"{n} rows, us": {"codes": 7.0, "bf16": 7.0} for n in (1, 3)}
    codes._experts(setting, ops, codes._FORMS["AWQ"], sizes, (2,))
    once = kernels.linear_codes
    monkeypatch.setattr(kernels, "linear_codes", lambda x, part: 1.02 * once(x, part))
    with pytest.raises(CheckFailed, match="1 rows have a relative error of 0.02"):
        codes._products(setting, ops, codes._FORMS["fp8"], 24, 48, (1,))


def test_each_stage_is_written_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = tmp_path / "out.json", []
    about = {"versions": {"commit": "abc"}}

    def run(stage: Stage, *_: object) -> StageReport:
        before.append(
            [each["name"] for each in json.loads(out.read_text())["stages"]] if out.exists() else None
        )
        broken = stage.name == "parity"
        return report(
            stage.name, Check("one", "failed" if broken else "passed", 1.0, "no" if broken else "", about)
        )

    monkeypatch.setattr(gpu_check, "run_stage", run)
    assert gpu_check.main(["--device", "cpu", "--stages", "parity,rates", "--out", str(out)]) == 1
    assert before == [None, None, ["parity"]]  # the first is the machine
    written = json.loads(out.read_text())
    assert [each["status"] for each in written["stages"]] == ["failed", "passed"]
    assert written["versions"] == {"commit": "abc"} and "date" in written
    assert "FAILED: parity. Send" in capsys.readouterr().out


def test_nothing_runs_on_a_machine_that_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run(stage: Stage, *_: object) -> StageReport:
        ran.append(stage.name)
        return report(stage.name, Check("machine", "failed", 1.0, "torch sees no GPU here"))

    monkeypatch.setattr(gpu_check, "run_stage", run)
    assert gpu_check.main(["--out", str(tmp_path / "out.json")]) == 1
    assert ran == ["machine"] and not list(tmp_path.iterdir())
    assert "torch sees no GPU here" in capsys.readouterr().out


def test_the_verdict_says_what_failed_and_what_to_do() -> None:
    passed = report("parity", Check("a", "passed", 1.0))
    failed = report("rates", Check("b", "passed", 1.0), Check("c", "failed", 1.0, "no memory"))
    hung = report("experts", Check("d", "failed", 0.0, "it did not end"), ended="ended at its limit in 'd'")
    skipped = report("nccl", Check("all", "skipped", 0.0, "there is one card"))
    unfinished = report("graphs", Check("e", "passed", 1.0), Check("f", "left out"))
    said = verdict("a card", [passed, failed, hung, skipped], "out.json")
    assert said.splitlines() == [
        "VERDICT for a card",
        "parity   passed     1 passed in 3 of 10 s",
        "rates    failed     1 passed, 1 failed in 3 of 10 s",
        "    c: no memory",
        "    what to do: advice on rates.",
        "experts  failed     1 failed in 3 of 10 s",
        "    ended at its limit in 'd'",
        "    d: it did not end",
        "    what to do: advice on experts.",
        "nccl     skipped    1 skipped in 3 of 10 s",
        "    there is one card",
        "FAILED: rates, experts. Send out.json with what was printed.",
    ]
    assert "UNFINISHED: graphs" in verdict("a card", [passed, unfinished], "out.json")
    assert "no time was left for: f" in verdict("a card", [passed, unfinished], "out.json")
    assert verdict("a card", [passed, skipped], "out.json").splitlines()[-1].startswith("PASSED. out.json")
    assert [exit_code(each) for each in ([passed, skipped], [passed, unfinished], [failed])] == [0, 1, 1]


def test_a_python_without_torch_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(
        f"gpu_check: {sys.executable} has no torch; install the packages"
    )


@pytest.mark.parametrize("words", ["one", "nonsense"])
def test_some_checks_alone_leave_the_results_of_all_and_words_that_no_check_has_are_refused(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"hardware": {"cpu": "AMD EPYC", "cores": 2}, "versions": {"commit": "abc"}}

    def run(stage: Stage, *_: object) -> StageReport:
        checks = [Check("one", "passed", 1.0, "", about)]
        return report(stage.name, *(checks if words == "one" or stage.name == "machine" else []))

    monkeypatch.setattr(gpu_check, "run_stage", run)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    if words == "one":
        assert gpu_check.main(["--device", "cpu", "--only", words]) == 0
        assert [file.name for file in tmp_path.iterdir()] == ["gpu-check-part-amd-2cores.json"]
        assert "PASSED on the CPU, which says nothing about GPUs" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="2"):
            gpu_check.main(["--device", "cpu", "--only", words])
        assert "no check has 'nonsense' in its name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "parity,speed"], "there is no stage 'speed'; the stages are parity, "),
        (["--stages", ","], "no stage is named; the stages are"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--layers", "0"], "must be a number above 0, not '0'"),
        (["--time-factor", "long"], "must be a number above 0, not 'long'"),
        (["--out", "/nowhere/out.json"], "--out /nowhere/out.json is in a directory that does not exist"),
        (["--quickly"], "unrecognized arguments: --quickly"),
    ],
)
def test_a_wrong_argument_is_told_in_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(arguments)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and said in told and told.startswith("gpu_check: ") and told.count("\n") == 1


def test_the_stages_import_with_what_the_library_needs_alone() -> None:
    allowed = {"torch", "safetensors", "tokenizers", "jinja2", "markupsafe", "triton"}
    blocked = sorted(
        {"ray", "pydantic", "transformers", "numpy", "tqdm", "yaml"} & set(packages_distributions())
    )
    assert "ray" in blocked and not allowed & set(blocked)
    modules = ", ".join(stage.module for stage in (*gpu_check.STAGES, gpu_check._MACHINE))
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import {modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
