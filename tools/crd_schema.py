"""Prunes KubeRay's CRD of the RayService to what a manifest is checked against, as JSON on stdout.

    python tools/crd_schema.py ray.io_rayservices.yaml > tests/data/kuberay/rayservice.json

Kept is the schema of version v1 without descriptions and without the status, which the operator writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def pruned(crd: dict[str, Any]) -> dict[str, Any]:
    """The openAPIV3Schema of `v1`, without what does not restrict a manifest."""
    [schema] = [
        version["schema"]["openAPIV3Schema"] for version in crd["spec"]["versions"] if version["name"] == "v1"
    ]
    del schema["properties"]["status"]
    return without_descriptions(schema)


def without_descriptions(schema: Any) -> Any:
    """`schema` without the descriptions of its parts; a property that is called description stays."""
    if isinstance(schema, list):
        return [without_descriptions(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: without_descriptions(part)
        for name, part in schema.items()
        if not (name == "description" and isinstance(part, str))
    }


if __name__ == "__main__":
    json.dump(pruned(yaml.safe_load(Path(sys.argv[1]).read_text())), sys.stdout, separators=(",", ":"))
    print()
