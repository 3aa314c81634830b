"""A choice's token deltas as text deltas."""

from __future__ import annotations

from qwen3_dist import SamplingParams
from qwen3_dist.engine.outputs import TokenDelta, TokenLogprob
from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.weights.source import bundled_path
from serve_app.choices import Choice


def test_tokens_after_a_stop_string_in_one_step_are_not_the_choices() -> None:
    tokenizer = Tokenizer.from_directory(bundled_path())
    assert tokenizer is not None
    ids = tuple(tokenizer.encode("one two three four"))
    logprobs = tuple(TokenLogprob(token_id, -1.0) for token_id in ids)
    choice = Choice(0, SamplingParams(stop=("three",)), tokenizer)
    delta = choice.advance(TokenDelta(0, ids, logprobs, "length"))
    assert (delta.text, delta.finish_reason) == ("one two ", "stop")
    assert tokenizer.decode(list(delta.token_ids)) == "one two three"
    assert [logprob.token_id for logprob in delta.logprobs] == list(delta.token_ids)
