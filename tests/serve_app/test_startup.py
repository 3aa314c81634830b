"""Which applications a deployment waits for, and which have failed."""

from __future__ import annotations

import pytest
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

from serve_app.launch.startup import has_failed


def application(
    status: str, trigger: str = "HEALTH_CHECK_FAILED", **replicas: int
) -> ApplicationStatusOverview:
    of_deployment = "HEALTHY" if status == "RUNNING" else "UNHEALTHY"
    deployment = DeploymentStatusOverview(of_deployment, trigger, replicas, "")  # type: ignore[arg-type]
    return ApplicationStatusOverview(status, "", 0.0, {"EngineReplica": deployment})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (application("RUNNING", RUNNING=1), False),
        (application("DEPLOYING", STARTING=1), False),
        (application("UNHEALTHY", RUNNING=1, STARTING=1), False),
        (application("UNHEALTHY", STARTING=1), False),
        (application("UNHEALTHY", STOPPING=1, STARTING=1), False),
        (application("UNHEALTHY", STOPPING=1), True),
        (application("UNHEALTHY", STARTING=0), True),
        (application("UNHEALTHY", "REPLICA_STARTUP_FAILED", STARTING=1), True),
        (application("DEPLOY_FAILED", RUNNING=1), True),
    ],
)
def test_an_application_has_failed_only_if_no_replica_comes_up(
    status: ApplicationStatusOverview, expected: bool
) -> None:
    assert has_failed(status) is expected
