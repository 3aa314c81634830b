"""What a replica waits for that Ray has not placed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import ray
from ray.util import placement_group_table

from cluster.ray_private import replica_name_prefix

_TOLERANCE = 1e-6  # of sums of fractions of a resource


def unplaced_bundles(name: str, deployment: str) -> str:
    """The bundles of a pending replica of application `name` and what they lack, as text; "" if no replica waits for
    resources. Asks Ray, which blocks."""
    prefix = replica_name_prefix(name, deployment)
    for group in placement_group_table().values():
        if group["state"] == "PENDING" and group["name"].startswith(prefix):
            return describe_room([*group["bundles"].values()], ray.available_resources())
    return ""


def describe_room(bundles: Sequence[Mapping[str, float]], free: Mapping[str, float]) -> str:
    """The room that `bundles` need, and which resource of the cluster they lack while `free` is free."""
    counts = Counter(str(dict(bundle)) for bundle in bundles)
    needed = ", ".join(
        f"{count} x {bundle}" if count > 1 else str(bundle) for bundle, count in counts.items()
    )
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)
    lacking = [
        f"{name} ({amount:g} needed, {free.get(name, 0.0):g} free)"
        for name, amount in total.items()
        if amount > free.get(name, 0.0) + _TOLERANCE
    ]
    why = f"there is too little {' and '.join(lacking)}" if lacking else "no node has room for one of them"
    return f"{needed}; {why}"
