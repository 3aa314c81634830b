"""Damage to the file x.safetensors of a folder."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path


def put_a_pipe_in_its_place(folder: Path) -> None:
    (folder / "x.safetensors").unlink()
    os.mkfifo(folder / "x.safetensors")  # reading one waits for a writer


def lose_what_a_link_points_to(folder: Path) -> None:
    (folder / "x.safetensors").rename(folder / "elsewhere")
    (folder / "x.safetensors").symlink_to("nowhere")


def write_header(folder: Path, text: str) -> None:
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(8))


def give_two_tensors_the_same_bytes(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_header(folder, json.dumps({"a": entry, "b": entry}))


def name_a_tensor_twice(folder: Path) -> None:
    first, second = ({"dtype": "F32", "shape": [1], "data_offsets": [at, at + 4]} for at in (0, 4))
    write_header(folder, f'{{"a": {json.dumps(first)}, "a": {json.dumps(second)}}}')


def nest_a_header_deeply(folder: Path) -> None:
    write_header(folder, "[" * 200_000)


def name_a_million_million_shards(folder: Path) -> None:
    (folder / "x.safetensors").rename(folder / "model-00001-of-999999999999.safetensors")
