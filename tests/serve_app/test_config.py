"""Settings of the service: flat arguments in, one frozen config out."""

from __future__ import annotations

import pytest

from qwen3_dist.errors import ConfigError, ParallelLayoutError
from qwen3_dist.layout import Layout
from serve_app.settings import BUNDLED_NAME, ModelSettings, read_service_config
from serve_app.settings.options import ingress_options


def test_text_from_serve_run_reads_as_the_settings_types() -> None:
    [model] = read_service_config(
        {"layout": "tp=2,ep=2", "max_replicas": "3", "upscale_delay_s": "0.5", "max_model_len": "null"}
    ).models
    assert model.replica.engine.layout == Layout(tp=2, ep=2)
    assert (model.scaling.max_replicas, model.scaling.upscale_delay_s) == (3, 0.5)
    assert model.replica.engine.max_model_len is None


def test_engine_settings_may_be_flat_or_nested() -> None:
    flat = read_service_config({"layout": "tp=2", "block_size": 8, "port": 8001})
    nested = read_service_config({"engine": {"layout": "tp=2", "block_size": 8}, "port": 8001})
    assert flat == nested


def test_a_model_name_that_looks_like_a_number_stays_text() -> None:
    assert read_service_config({"model_name": "7"}).models[0].name == "7"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"max_replica": 2}, "unknown setting 'max_replica'"),
        ({"max_replicas": "many"}, "max_replicas must be a whole number, not 'many'"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas=3 must lie between 0 and max_replicas=2"),
        ({"port": 70000}, "port must lie between 1 and 65535"),
        ({"downscale_delay_s": -1}, "downscale_delay_s must not be negative"),
        (
            {"target_ongoing_requests": 9, "max_ongoing_requests": 8, "max_replicas": 2},
            "load could never add a replica",
        ),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests must be positive, not 0"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda"),
        ({"engine": "tp=2"}, "engine must be a mapping"),
        (
            {"ingress_replicas": 2, "max_ingress_replicas": 1},
            "max_ingress_replicas=1 must not be less than ingress_replicas=2",
        ),
        ({"ingress_target_requests": 0}, "ingress_target_requests must be positive, not 0"),
        ({"target_kv_usage": 1.5}, "target_kv_usage must be a share of at most 1, not 1.5"),
        ({"target_tokens": 0}, "target_tokens must be positive, not 0"),
        ({"target_ttft_s": -1}, "target_ttft_s must be positive, not -1"),
        ({"queue_timeout_s": -1}, "queue_timeout_s must not be negative"),
        (
            {"queue_timeout_s": 60, "request_timeout_s": 60},
            "queue_timeout_s=60 must be less than request_timeout_s=60, which would end the request first",
        ),
    ],
)
def test_a_bad_setting_is_named(args: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_service_config(args)


def test_ingresses_are_as_many_as_was_set_or_follow_the_load() -> None:
    def scaling(**args: object) -> dict[str, object]:
        options = ingress_options(read_service_config(args))
        assert "num_replicas" not in options  # Serve restarts replicas when autoscaling comes or goes
        found: dict[str, object] = options["autoscaling_config"]
        return found

    for fixed in (scaling(ingress_replicas=2), scaling(ingress_replicas=2, max_ingress_replicas=2)):
        assert (fixed["min_replicas"], fixed["max_replicas"]) == (2, 2)
    models = [{"model_name": "a", "upscale_delay_s": 3}, {"model_name": "b", "downscale_delay_s": 500}]
    scaled = scaling(max_ingress_replicas=4, ingress_target_requests=50, upscale_delay_s=2, models=models)
    assert scaled == {
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": 50,
        "upscale_delay_s": 3,
        "downscale_delay_s": 500,
        "metrics_interval_s": 2,
        "look_back_period_s": 10,
    }


def test_scaling_aims_for_no_more_requests_than_a_replica_holds() -> None:
    def target(**args: object) -> float:
        return read_service_config(args).models[0].scaling.scaling_target

    assert target() == target(max_replicas=2) == 16
    assert target(max_ongoing_requests=8) == target(max_ongoing_requests=8, max_replicas=2) == 8
    assert target(target_ongoing_requests=4, max_ongoing_requests=8, max_replicas=2) == 4
    assert target(target_ongoing_requests=16, max_ongoing_requests=8) == 8  # no replica could be added


def test_a_bad_layout_is_refused_before_anything_starts() -> None:
    with pytest.raises(ParallelLayoutError, match="ep=3 does not divide"):
        read_service_config({"layout": "tp=2,ep=3"})


def test_the_served_name_is_the_given_one_or_the_models(tmp_path) -> None:
    checkpoint = tmp_path / "Qwen3-Tiny"
    checkpoint.mkdir()
    assert ModelSettings().name == BUNDLED_NAME
    assert read_service_config({"model": str(checkpoint)}).models[0].name == "Qwen3-Tiny"
    assert read_service_config({"model": "Qwen/Qwen3-0.6B"}).models[0].name == "Qwen/Qwen3-0.6B"
    assert read_service_config({"model": str(checkpoint), "model_name": "tiny"}).models[0].name == "tiny"
