"""What the fake service answers: by a word in the question, pairs of a delta's field and its text."""

from __future__ import annotations

from typing import Any

Part = tuple[str, Any]
CALL, ERROR, SLOW = "call", "error", "slow"  # a part of a tool call; an error event; seconds without a part

ATTACKS = """<script>window.hacked = 1</script>

<img src=x onerror="window.hacked = 2">

**<svg onload="window.hacked = 3">** and `<iframe srcdoc="<script>parent.hacked = 4</script>">`

[click](javascript:window.hacked=5) ![](x" onerror="window.hacked = 6)

- <a href="javascript:window.hacked = 7">list</a>

# <style>body { display: none }</style> heading

| a | b |
|---|---|
| <img src=y onerror=window.hacked=8> | </td></table><script>window.hacked = 9</script> |

```html"><img src=z onerror="window.hacked=10">
</code></pre><script>window.hacked = 11</script>
```

```<script>
<script>window.hacked = 12</script>
"""

MARKDOWN = """## Why the sky is blue

Sunlight holds **all colours**. Air scatters *short* waves more strongly, by `1 / wavelength⁴`:

1. Blue light reaches you from every direction.
2. Red light goes nearly straight.
   - At sunset its way through the air is longest,
   - so that red is what is left.

| colour | wavelength | scattered |
|---|---|---|
| blue | 450 nm | 4.4 × |
| red | 650 nm | 1 × |

```python
def scattered(wavelength_nm: float) -> float:
    return (650 / wavelength_nm) ** 4
```

So the sky takes the colour that the air scatters most.
"""


def split(field: str, text: str, size: int = 7) -> list[Part]:
    return [(field, text[at : at + size]) for at in range(0, len(text), size)]


THOUGHTS = "The user asks about scattering. Rayleigh's law goes with the fourth power of the wavelength."
SCRIPTS: dict[str, list[Part]] = {
    "sky": [*split("reasoning_content", THOUGHTS), (SLOW, 0.2), *split("content", MARKDOWN)],
    "weather": [
        *split("reasoning", "I need the tool."),
        (
            CALL,
            {
                "index": 0,
                "id": "call-1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": ""},
            },
        ),
        (CALL, {"index": 0, "function": {"arguments": '{"city": "Pa'}}),
        (CALL, {"index": 0, "function": {"arguments": 'ris", "days": 2}'}}),
    ],
    "result": split("content", "In Paris it is **sunny**."),
    "attack": [*split("reasoning_content", ATTACKS, 23), *split("content", ATTACKS, 23)],
    "break": [*split("content", "The answer begins"), (ERROR, "the engine died; ask again")],
    "hang up": split("content", "Half an answ"),
    "slow": [
        ("content", "one "),
        *[part for _ in range(600) for part in ((SLOW, 0.1), ("content", "more "))],
    ],
    "think long": [("reasoning_content", "Hm. "), (SLOW, 60)],
    "refuse": [],
    "plain": split("content", "Hello! How can I help you?"),
}
