"""Reading a service's log files: which are its own, rotated ones first, and only what is new."""

from __future__ import annotations

from pathlib import Path

from serve_app.launch.logs import read_files

NAME = "qwen3_dist"


def line(second: int, word: str) -> str:
    return f"2026-11-29T08:00:{second:02d}.000Z INFO log p {word}\n"


def texts(directory: Path, known: dict[int, int] | None = None, most: int | None = None) -> list[str]:
    return [entry.text.split()[-1] for entry in read_files(directory, NAME, known or {}, most).entries]


def test_only_the_services_files_are_read_rotated_ones_first(tmp_path: Path) -> None:
    ours = ["_Ingress_a1.log", "_Ingress_a1.log.1", "--Qwen-Qwen3_EngineReplica_b2.log"]
    for number, name in enumerate(ours):
        (tmp_path / f"replica_{NAME}{name}").write_text(line(9 - number, f"ours{number}"))
    for name in ("replica_other_Ingress_a1.log", f"replica_{NAME}2_Ingress_a1.log", "proxy_1.log"):
        (tmp_path / name).write_text(line(1, "foreign"))
    assert texts(tmp_path)[0] == "ours1"
    assert sorted(texts(tmp_path)) == ["ours0", "ours1", "ours2"]


def test_a_traceback_belongs_to_the_line_above_it(tmp_path: Path) -> None:
    trace = "Traceback (most recent call last):\n  File x\nTypeError: secret\n"
    (tmp_path / f"replica_{NAME}_Ingress_a1.log").write_text(
        "a line of Serve\n" + line(1, "bad") + trace + line(2, "next") + '{"time":"2026-11-29T08:00:03Z"}\n'
    )
    entries = read_files(tmp_path, NAME, {}, None).entries
    assert [entry.time[-4:] for entry in entries] == ["", "000Z", "000Z", ":03Z"]
    assert entries[1].text.endswith("TypeError: secret")
    assert len(read_files(tmp_path, NAME, {}, most=2).entries) == 2


def test_what_is_known_is_not_told_again_even_once_the_file_has_rotated(tmp_path: Path) -> None:
    file = tmp_path / f"replica_{NAME}_Ingress_a1.log"
    file.write_text(line(1, "one") + line(2, "two").rstrip("\n"))
    reading = read_files(tmp_path, NAME, {}, None)
    assert [entry.text.split()[-1] for entry in reading.entries] == ["one"]
    file.write_text(line(1, "one") + line(2, "two"))
    file.rename(f"{file}.1")
    file.write_text(line(3, "three"))
    assert texts(tmp_path, reading.known) == ["two", "three"]


def test_a_file_that_got_the_inode_of_a_removed_one_is_read_from_its_beginning(tmp_path: Path) -> None:
    file = tmp_path / f"replica_{NAME}_Ingress_a1.log"
    file.write_text(line(1, "one") + line(2, "two"))
    known = read_files(tmp_path, NAME, {}, None).known
    file.write_text(line(3, "three"))  # which keeps the inode
    assert texts(tmp_path, known) == ["three"]


def test_a_reading_names_all_services_with_files(tmp_path: Path) -> None:
    for name in ("a_Ingress_x", "a--m_EngineReplica_y", "b.c--Qwen-Qwen3_EngineReplica_z"):
        (tmp_path / f"replica_{name}.log").touch()
    assert read_files(tmp_path, "nothing", {}, None).services == {"a", "b.c"}
