"""A service as a batch script of Slurm: a Ray cluster on the job's nodes, and the service in the foreground."""

from __future__ import annotations

from shlex import quote

from qwen3_dist.errors import ConfigError
from serve_app.render.options import NodeOptions, SlurmOptions
from serve_app.render.service import ENVIRONMENT, for_cluster, grace_s, node_range, service_yaml, takes_gpus
from serve_app.settings import ServiceConfig

_MARK = "END_OF_SERVICE"
_SCRIPT = """\
#!/bin/bash
{directives}

# Ends gracefully: scancel --batch --signal=TERM JOB. Plain scancel ends the Ray nodes at the same moment.
set -euo pipefail
{prologue}
export {environment}
# Other users of the network cannot join this Ray: it asks for a token that only this job knows.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

work=$(mktemp -d)
cat > "$work/service.yaml" <<'{mark}'
{service}{mark}

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=${{hosts[0]}}:{port}
service=

finish() {{
    trap '' TERM INT
    mapfile -t running < <(jobs -p)
    [ ${{#running[@]}} -eq 0 ] || kill -TERM "${{running[@]}}" 2> "$work/kill" || true
    wait
    rm -rf "$work"
}}
stop() {{
    if [ -n "$service" ]; then kill -TERM "$service"; else exit 143; fi
}}
trap finish EXIT
trap stop TERM INT

ray_node() {{  # HOST, then arguments of `ray start`
    local host=$1
    shift
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$host" \\
        ray start --block --disable-usage-stats --num-cpus={cpus} --num-gpus={gpus} "$@" &
}}
wait_for_nodes() {{  # COUNT. Bash handles a signal while it waits for a background job, but not for a command.
    python -m cluster.nodes wait "$address" "$1" &
    wait $!
}}
ray_node "${{hosts[0]}}" --head --port={port} --include-dashboard=false
wait_for_nodes 1
for host in "${{hosts[@]:1}}"; do
    ray_node "$host" --address="$address"
done
wait_for_nodes "${{#hosts[@]}}"

qwen3-dist serve --config "$work/service.yaml" --ray-address "$address" &
service=$!
code=0
wait "$service" || code=$?
while kill -0 "$service" 2> "$work/kill"; do  # a signal ended the wait, and the service is still ending
    code=0
    wait "$service" || code=$?
done
exit "$code"
"""


def render(config: ServiceConfig, nodes: NodeOptions, options: SlurmOptions) -> str:
    """The script for `sbatch`. Raises ConfigError, ParallelLayoutError."""
    config = for_cluster(config, nodes)
    _, count = node_range(config, nodes)
    gpus = nodes.gpus_per_node if takes_gpus(config) else 0
    service = service_yaml(config)
    if _MARK in service:
        raise ConfigError(f"the config must not hold {_MARK}, which marks its end in the script")
    directives = {
        "job-name": config.endpoint.name,
        "nodes": str(count),
        "ntasks-per-node": "1",
        "cpus-per-task": str(nodes.cpus_per_node),
        "mem": f"{nodes.memory_gib}G",
        "gpus-per-node": str(gpus) if gpus else "",
        "partition": options.partition,
        "account": options.account,
        "time": options.time_limit,
        # Before the time limit, the script is told to end, with time left for running requests.
        "signal": f"B:TERM@{grace_s(config)}",
    }
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH --{name}={value}" for name, value in directives.items() if value),
        prologue=options.prologue,
        environment=" ".join(f"{name}={quote(value)}" for name, value in ENVIRONMENT.items()),
        service=service,
        mark=_MARK,
        port=options.ray_port,
        cpus=nodes.cpus_per_node,
        gpus=gpus,
    )
