"""What a serving process leaves out of its collections of garbage."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc, weakref
import torch
from qwen3_dist.gc_utils import freeze_gc_heap

class Node:
    pass

freeze_gc_heap()
assert gc.get_freeze_count() > 50_000 and len(gc.get_objects()) < 1_000
node = Node()
node.itself = node
gone = weakref.ref(node)
del node
gc.collect()
assert gone() is None
"""


def test_what_is_there_is_left_out_and_what_comes_later_is_not() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
