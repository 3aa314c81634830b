"""The service's container image. It holds no settings, so one image serves every config."""

from __future__ import annotations

from serve_app.render.options import DockerOptions
from serve_app.settings import ServiceConfig

HOME = "/opt/qwen3-dist"
CACHE = "/var/cache/qwen3-dist"
# What writes files writes them here, since a user without an entry in /etc/passwd has no home.
_CACHES = {
    "HOME": CACHE,
    "XDG_CACHE_HOME": CACHE,
    "HF_HOME": f"{CACHE}/huggingface",
    "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/inductor",
    "TRITON_CACHE_DIR": f"{CACHE}/triton",
    "TRITON_HOME": CACHE,
    "MPLCONFIGDIR": f"{CACHE}/matplotlib",
    "USER": "qwen3-dist",  # getpass.getuser() fails without it for such a user
}
_DOCKERFILE = """\
# Build in the root of this repository: docker build -f cluster/deploy/docker/Dockerfile -t qwen3-dist .
FROM {base}

# A compiler at run time: Triton builds launchers of kernels, and CPU ranks build their kernels for the CPU they meet.
RUN apt-get update && apt-get install -y --no-install-recommends \\
        python3 python3-dev python3-venv gcc g++ curl ca-certificates \\
    && rm -rf /var/lib/apt/lists/*

ENV PATH={home}/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv {home}

# The largest layer changes with torch only.
COPY constraints.txt {home}/src/
RUN pip install -c {home}/src/constraints.txt torch triton

COPY pyproject.toml README.md LICENSE {home}/src/
COPY qwen3_dist {home}/src/qwen3_dist
COPY cluster {home}/src/cluster
COPY serve_app {home}/src/serve_app
RUN pip install -c {home}/src/constraints.txt {home}/src \\
    && rm -r {home}/src

# KubeRay starts Ray in a login shell, which may set PATH anew.
RUN echo 'export PATH={home}/bin:$PATH' > /etc/profile.d/qwen3-dist.sh

# Any user may run this image, also one that the platform picks.
RUN mkdir -p {cache} && chmod 1777 {cache}
ENV {caches}
WORKDIR {cache}
USER 1000:1000

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \\
    CMD curl --fail --silent --show-error http://127.0.0.1:8000/ready
ENTRYPOINT ["qwen3-dist"]
CMD ["serve", "--host", "0.0.0.0"]
"""


def render(config: ServiceConfig, options: DockerOptions) -> str:
    """The Dockerfile."""
    caches = " \\\n    ".join(f"{name}={value}" for name, value in _CACHES.items())
    return (
        _DOCKERFILE.format(base=options.base_image, home=HOME, cache=CACHE, caches=caches)
        .replace(":8000/ready", f":{config.endpoint.port}{config.endpoint.route_prefix.rstrip('/')}/ready")
        .replace("EXPOSE 8000", f"EXPOSE {config.endpoint.port}")
    )
