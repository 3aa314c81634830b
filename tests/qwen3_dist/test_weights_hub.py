"""Downloads from the hub, for which a server on this machine stands: once, further after a fault, and what is told."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.errors import CheckpointError, EngineDeadError
from qwen3_dist.launch import rank_group
from qwen3_dist.launch.rank_group import RankGroupExecutor
from qwen3_dist.protocol.messages import Downloading, Loaded
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights import hub as hub_module
from qwen3_dist.weights.source import bundled_path, resolve_config, resolve_model
from tests.hub import COMMIT, MODEL, Hub, serving

CONFIGS = {"config.json", "generation_config.json"}
WEIGHTS = "model.safetensors"
FILES = {file.name for file in bundled_path().iterdir()} - {"README.md"}
RESOLVE = f"import sys; from qwen3_dist.weights.source import resolve_model; print(resolve_model('{MODEL}'))"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the bundled model, for this process and those that it starts, whose cache is empty."""
    with serving(bundled_path()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        of_files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", of_files)
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        yield hub


def is_whole(path: Path) -> bool:
    return all((path / name).read_bytes() == (bundled_path() / name).read_bytes() for name in FILES)


def resolving() -> subprocess.Popen[str]:
    """Another process that resolves the model and prints where it is."""
    return subprocess.Popen([sys.executable, "-c", RESOLVE], stdout=subprocess.PIPE, text=True)


def test_only_what_is_needed_is_downloaded_and_a_commit_in_the_cache_asks_nothing(hub: Hub) -> None:
    resolve_config(MODEL)
    assert hub.gets.keys() == CONFIGS
    path = resolve_model(MODEL)
    assert is_whole(path) and hub.gets == dict.fromkeys(FILES, 1)
    asked = hub.num_requests
    assert resolve_model(MODEL, COMMIT) == path and hub.num_requests == asked
    hub.refusal = (503, "")
    assert resolve_model(MODEL) == path


def test_processes_of_a_host_download_each_file_once(hub: Hub) -> None:
    processes = [resolving() for _ in range(2)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert len(paths) == 1 and is_whole(Path(paths.pop()))
    assert set(hub.gets.values()) == {1}


def test_a_killed_download_keeps_whole_files_and_a_lost_connection_keeps_parts(
    hub: Hub, tmp_path: Path
) -> None:
    folder = tmp_path / "home" / "hub" / "models--org--name" / "snapshots" / COMMIT
    hub.cut_after, hub.go_on = 100_000, threading.Event()
    process = resolving()
    while hub.cut_after is not None or not all((folder / name).exists() for name in FILES - {WEIGHTS}):
        assert process.poll() is None
    process.kill()
    process.communicate()
    hub.go_on.set()
    hub.cut_after = 100_000
    assert is_whole(resolve_model(MODEL))
    assert hub.ranges == [WEIGHTS] and hub.gets == {**dict.fromkeys(FILES, 1), WEIGHTS: 3}


def test_ranks_of_another_host_download_too(hub: Hub, tmp_path: Path) -> None:
    greedy = SamplingParams(max_tokens=4, temperature=0)
    texts = []
    for settings in (
        {"model": "bundled"},
        {
            "model": MODEL,
            "layout": "tp=2",
            "executor": "processes",
            "rank_env": {"HF_HOME": str(tmp_path / "other")},
        },
    ):
        with LLM(**settings, device="cpu", num_blocks=16, use_tqdm=False) as llm:  # type: ignore[arg-type]
            texts.append(llm.generate(["Hello"], greedy, use_tqdm=False)[0].outputs[0].text)
    assert texts[0] == texts[1]
    assert hub.gets[WEIGHTS] == 2 and (tmp_path / "other" / "hub").is_dir()


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        (
            (401, "RepoNotFound"),
            f"the hub has no model '{MODEL}', or it needs a login; check the id, or set HF_TOKEN",
        ),
        ((403, "GatedRepo"), "or it needs a login"),
        ((404, "RevisionNotFound"), "has no revision None; check --revision"),
        ((500, ""), "the hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_told(hub: Hub, refusal: tuple[int, str], sentence: str) -> None:
    hub.refusal = refusal
    with pytest.raises(CheckpointError) as caught:
        resolve_model(MODEL)
    assert sentence in str(caught.value)


def test_a_full_disk_is_told_and_what_is_there_stays(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*arguments: object, **options: object) -> None:
        with open("/dev/full", "wb") as file:
            file.write(b"0")

    resolve_config(MODEL)
    with monkeypatch.context() as full:
        full.setattr("huggingface_hub.file_download.http_get", write)
        with pytest.raises(
            CheckpointError, match=r"the disk of the hub cache .* is full .* set HF_HOME to a larger"
        ):
            resolve_model(MODEL)
    assert is_whole(resolve_model(MODEL)) and hub.gets["config.json"] == 1


def test_a_hub_that_goes_away_in_the_middle_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its tries
    resolve_config(MODEL)
    hub.cut_after, hub.goes_away = 100_000, True
    with pytest.raises(
        CheckpointError, match="the download of 'org/name' was interrupted .* whole files are kept"
    ):
        resolve_model(MODEL)


@pytest.mark.parametrize("tells_sizes", [True, False])
def test_a_long_download_is_logged_and_tells_its_progress(
    hub: Hub, tells_sizes: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.tells_sizes = tells_sizes
    monkeypatch.setattr(hub_module, "_PERIOD_S", 0.01)
    hub.cut_after, hub.go_on = len(hub.files[WEIGHTS]) // 2, threading.Event()
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        if hub.cut_after is None and done > len(hub.files[WEIGHTS]) // 4:
            hub.go_on.set()  # type: ignore[union-attr]

    with caplog.at_level(logging.INFO, "qwen3_dist"):
        path = resolve_model(MODEL, progress=progress)
    total = sum(file.stat().st_size for file in path.iterdir())
    assert told[-1][1] == (total if tells_sizes else 0) and 0 < told[-1][0] <= total
    assert f"downloading {MODEL}: " in caplog.text
    assert (f" of {total / 1e9:.2f} GB, " in caplog.text) == tells_sizes


def test_ranks_that_download_may_take_longer_than_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Ranks:
        """One rank that sends a message each 400 s."""

        ranks = (0,)

        def __init__(self, *messages: object) -> None:
            self._messages = list(messages)

        def next_message(self, deadline: float, late: object) -> tuple[int, object]:
            nonlocal now
            now += 400
            if now > deadline:
                raise EngineDeadError("late")
            return 0, self._messages.pop(0)

        def reporting_root_cause(self) -> object:
            return contextlib.nullcontext()

    executor = object.__new__(RankGroupExecutor)
    monkeypatch.setattr(rank_group.time, "monotonic", lambda: now)
    executor._config, executor._deadline = EngineConfig(start_timeout_s=600), 600.0
    executor._ranks = Ranks(Downloading(), Downloading(), Loaded(5))  # type: ignore[assignment]
    assert executor._await_all(Loaded, "load", {}) == [Loaded(5)]
    executor._ranks = Ranks(Downloading(), Loaded(5), Loaded(6))  # type: ignore[assignment]
    now, executor._deadline = 0.0, 300.0
    with pytest.raises(EngineDeadError):
        executor._await_all(Loaded, "load", {})
