"""The tokenizer for llguidance: the checkpoint's tokenizer, changed so that it never turns text into special tokens.

llguidance tokenizes the text that a grammar forces. The checkpoint's tokenizer turns the text `<tool_call>` into one
special token, which llguidance then refuses because a text cannot contain special tokens. It also normalizes
characters (NFC), so the tokens may stand for other text than the grammar forces.
"""

from __future__ import annotations

import json
from typing import Any

from qwen3_dist.text.tokenizer import spelled_in_bytes

_SPECIAL = b"\xff"  # llguidance's prefix of special tokens; UTF-8 never contains this byte


def grammar_tokenizer(text: str) -> str:
    """Returns the JSON of a tokenizer with the tokens of `text`, that of a tokenizer.json, that splits text into
    ordinary tokens only. Grammars can still name special tokens.

    Raises ValueError or KeyError if `text` is not that of a tokenizer.
    """
    tokenizer: dict[str, Any] = json.loads(text)
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    for token in tokenizer["added_tokens"]:
        content, token_id = token["content"], token["id"]
        if vocabulary.get(content) == token_id:
            del vocabulary[content]
        is_special = token["special"] or (content.startswith("<") and content.endswith(">"))
        name = (_SPECIAL if is_special else b"") + content.encode()
        vocabulary[spelled_in_bytes(name)] = token_id  # no merge produces it, so no text is tokenized to it
    return json.dumps({**tokenizer, "added_tokens": [], "normalizer": None, "post_processor": None})
