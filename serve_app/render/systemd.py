"""A service of one machine as a unit of systemd, which starts its Ray with it."""

from __future__ import annotations

from serve_app.render.options import SystemdOptions
from serve_app.render.service import grace_s, refuse_secrets
from serve_app.settings import ServiceConfig

_UNIT = """\
# Install as /etc/systemd/system/qwen3-dist.service, with the service's config in /etc/qwen3-dist/service.yaml.
[Unit]
Description=qwen3-dist, an OpenAI-compatible endpoint for Qwen3
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={executable} serve --config /etc/qwen3-dist/service.yaml
EnvironmentFile=-{environment_file}
Environment=HOME=%S/qwen3-dist XDG_CACHE_HOME=%C/qwen3-dist HF_HOME=%C/qwen3-dist/huggingface
Environment=TORCHINDUCTOR_CACHE_DIR=%C/qwen3-dist/inductor TRITON_CACHE_DIR=%C/qwen3-dist/triton
User={user}
DynamicUser=yes
StateDirectory=qwen3-dist
CacheDirectory=qwen3-dist
WorkingDirectory=%S/qwen3-dist

# SIGTERM goes to the service alone, which lets running requests end and then ends Ray. What is left after that is
# killed.
KillMode=mixed
TimeoutStopSec={grace}
Restart=on-failure
RestartSec=5

LimitNOFILE=65536
LimitMEMLOCK=infinity
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes

[Install]
WantedBy=multi-user.target
"""


def render(config: ServiceConfig, options: SystemdOptions) -> str:
    """The unit. Raises ConfigError."""
    refuse_secrets(config)
    return _UNIT.format(
        executable=options.executable,
        environment_file=options.environment_file,
        user=options.user,
        grace=grace_s(config),
    )
