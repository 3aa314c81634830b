"""What a replica waits for: whose placement groups count, and which resource is named."""

from __future__ import annotations

import pytest

from serve_app import waiting
from serve_app.waiting import describe_room, unplaced_bundles


def group(name: str, state: str = "PENDING") -> dict[str, object]:
    return {"name": name, "state": state, "bundles": {0: {"CPU": 1000.0}}}


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        ([group("")], ""),
        ([group("SERVE_REPLICA::other#EngineReplica#x1")], ""),
        ([group("SERVE_REPLICA::mine#Other#x1")], ""),
        ([group("SERVE_REPLICA::mine#EngineReplica#x1", "CREATED")], ""),
        (
            [group("somebody's"), group("SERVE_REPLICA::mine#EngineReplica#x1")],
            "{'CPU': 1000.0}; there is too little CPU (1000 needed, 2 free)",
        ),
    ],
)
def test_only_a_placement_group_of_our_own_deployment_waits_for_room(
    monkeypatch: pytest.MonkeyPatch, groups: list[dict[str, object]], found: str
) -> None:
    monkeypatch.setattr(waiting, "placement_group_table", lambda: dict(enumerate(groups)))
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 2.0})
    assert unplaced_bundles("mine", "EngineReplica") == found


def test_the_resource_that_is_missing_is_named_and_no_other() -> None:
    bundles = [{"CPU": 1.0}, {"CPU": 0.5, "GPU": 4.0}, {"CPU": 0.5, "GPU": 4.0}]
    assert describe_room(bundles, {"CPU": 64.0, "GPU": 6.0}) == (
        "{'CPU': 1.0}, 2 x {'CPU': 0.5, 'GPU': 4.0}; there is too little GPU (8 needed, 6 free)"
    )
    assert describe_room([{"CPU": 0.1}] * 3, {"CPU": 0.1 + 0.1 + 0.1}) == (
        "3 x {'CPU': 0.1}; no node has room for one of them"
    )
    assert "too little CPU (2 needed, 1 free) and GPU (8 needed, 0 free)" in describe_room(
        bundles, {"CPU": 1.0}
    )
