"""`qwen3-dist keys`: makes a key for a keys file, and checks such a file."""

from __future__ import annotations

import argparse
import json
from typing import TextIO

from serve_app.settings.keys import Key, hash_of, new_key, read_keys

HELP = "make a new API key and its entry of a keys file, or check a keys file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser("new", help="print a new key, and the entry that a keys file needs for it")
    new.add_argument("name", help="name of the key, which logs and metrics show")
    new.add_argument("--admin", action="store_true", help="for a key that may change the service")
    check = actions.add_parser("check", help="read a keys file as the service does, and list its keys")
    check.add_argument("file", help="the keys file")


def run(args: argparse.Namespace, out: TextIO) -> int:
    if args.action == "check":
        for each in read_keys(args.file):
            _show(out, args.json, {"name": each.name, "admin": each.admin})
        return 0
    key = new_key()
    entry = Key(args.name, hash_of(key), args.admin)  # raises ConfigError for a bad name
    admin = ", admin: true" if entry.admin else ""
    if args.json:
        print(json.dumps({"name": entry.name, "key": key, "hash": entry.key, "admin": entry.admin}), file=out)
    else:
        print(f"{key}\n", file=out)
        print(f"  - {{name: {entry.name}, key: {entry.key}{admin}}}", file=out)
    return 0


def _show(out: TextIO, as_json: bool, key: dict[str, object]) -> None:
    text = f"{key['name']}{' (admin)' if key['admin'] else ''}"
    print(json.dumps(key) if as_json else text, file=out)
