"""The common loop of all drivers. Imports only the standard library, since each system's interpreter runs it."""

import json
from collections.abc import Callable


def drive(work: dict, seconds: Callable[[list, int], float]) -> None:
    """Runs `work`. `seconds(prompts, output_len)` generates `output_len` tokens for each prompt and returns the
    time."""
    seconds(work["first"], 1)
    print(json.dumps({"ready": True}), flush=True)
    for row in work["rows"]:
        taken = [seconds(prompts, row["output_len"]) for prompts in row["prompts"]]
        print(json.dumps({"row": row["row"], "seconds": taken}), flush=True)
