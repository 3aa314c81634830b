"""What all drivers do alike. It needs nothing but Python: each system's interpreter runs it."""

import json
from collections.abc import Callable


def drive(work: dict, seconds: Callable[[list, int], float]) -> None:
    """Runs WORK; `seconds(prompts, output_len)` makes so many tokens from each prompt and says how long it took."""
    seconds(work["first"], 1)
    print(json.dumps({"ready": True}), flush=True)
    for row in work["rows"]:
        taken = [seconds(prompts, row["output_len"]) for prompts in row["prompts"]]
        print(json.dumps({"row": row["row"], "seconds": taken}), flush=True)
