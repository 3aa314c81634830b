"""Ray's private names: all in one module, all present in the pinned version of Ray."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants
from ray.serve import context
from ray.serve._private import constants, http_util

from cluster import ray_private
from qwen3_dist.errors import ResourceError

ROOT = Path(__file__).parent.parent.parent
PRIVATE = re.compile(
    r"""\bray[\w.]*\._|["']RAY_(?!TMPDIR)\w+["']|_by_reference|_message_queue|_global_client|\b_blocking=|_init_router|_asyncio_router|_fetch_replica"""
)


def test_private_names_of_ray_are_in_one_module() -> None:
    files = [
        file
        for room in ("qwen3_dist", "cluster", "serve_app", "benchmarks")
        for file in (ROOT / room).rglob("*.py")
    ]
    users = {str(file.relative_to(ROOT)) for file in files if PRIVATE.search(file.read_text())}
    assert users == {"cluster/ray_private.py"}


def test_they_were_checked_with_the_pinned_version() -> None:
    assert f"ray=={ray_private.TESTED_WITH}\n" in (ROOT / "constraints.txt").read_text()


def test_this_version_of_serve_has_them() -> None:
    ray_private.check_serve()


@pytest.mark.parametrize(
    "name",
    [
        *ray_private.CLUSTER_ENVIRONMENT,
        *ray_private.DEPLOYMENT_ENVIRONMENT,
        ray_private.PROXY_MIDDLEWARES,
        ray_private.HAPROXY,
    ],
)
def test_this_version_of_ray_reads_the_setting(name: str) -> None:
    names = (name, name.removeprefix("RAY_SERVE_"))
    gcs = Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server"
    assert (
        any(hasattr(constants, each) for each in names)
        or name == ray_constants.RAY_WORKER_NICENESS
        or name.encode() in gcs.read_bytes()
    )


@pytest.mark.parametrize(("holder", "name"), [(context, "_get_global_client"), (http_util, "MessageQueue")])
def test_a_name_that_is_gone_is_told_with_the_version_that_has_it(
    holder: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(holder, name)
    with pytest.raises(ResourceError) as told:
        ray_private.check_serve()
    assert f"ray {ray.__version__} has no ray.serve." in str(told.value) and name in str(told.value)
    assert f"pip install 'ray[serve]=={ray_private.TESTED_WITH}'" in str(told.value)
