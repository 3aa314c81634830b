"""The tokenizer that grammars are followed with: added tokens such as <tool_call> are no text in it.

The library splits text that a grammar forces by the checkpoint's own tokenizer. That one makes one token of the text
`<tool_call>`, which the library then refuses, since a text never allows a special token. And it composes characters
(NFC), so that what comes back may not be the text that was forced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen3_dist.text.tokenizer import spelled_in_bytes

_SPECIAL = b"\xff"  # how the library marks tokens that are no text; no UTF-8 holds this byte


def grammar_tokenizer(file: Path) -> str:
    """The JSON of a tokenizer with the tokens of `file`, a tokenizer.json, that splits text into ordinary ones alone.

    Grammars name special tokens as before. Raises OSError, ValueError or KeyError for a file that is no tokenizer.
    """
    tokenizer: dict[str, Any] = json.loads(file.read_bytes())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    for token in tokenizer["added_tokens"]:
        content, token_id = token["content"], token["id"]
        if vocabulary.get(content) == token_id:
            del vocabulary[content]
        is_special = token["special"] or (content.startswith("<") and content.endswith(">"))
        name = (_SPECIAL if is_special else b"") + content.encode()
        vocabulary[spelled_in_bytes(name)] = token_id  # no merge makes it, so no text becomes it
    return json.dumps({**tokenizer, "added_tokens": [], "normalizer": None, "post_processor": None})
