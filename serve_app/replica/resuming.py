"""Goes on with an answer that another replica began."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus

from qwen3_dist.errors import RequestError
from qwen3_dist.protocol.outputs import TokenDelta, TokenLogprob
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.text.choice import ChoiceDelta, Choices
from serve_app.apis.shared.resume import Resume, Sent


def sent_of(deltas: Iterable[TokenDelta], first_index: int, with_scores: bool) -> Sent:
    """Returns what `deltas` of a prompt, whose first choice has `first_index`, add to what there is of the answer."""
    return (
        *[
            (
                first_index + d.index,
                d.token_ids,
                d.finish_reason,
                d.num_cached_tokens,
                _scores(d) if with_scores else b"",
            )
            for d in deltas
        ],
    )


def _scores(delta: TokenDelta) -> bytes:
    has_scores = delta.logprobs or delta.prompt_logprobs is not None
    return pickle.dumps((delta.logprobs, delta.prompt_logprobs)) if has_scores else b""


def check_model(resume: Resume, model: str) -> None:
    """Raises RequestError if another checkpoint than `model` began the answer."""
    if resume.model not in ("", model):
        raise RequestError(
            "the answer cannot go on: the model was changed while it was generated; send the request again",
            param="model",
            status=HTTPStatus.CONFLICT,
        )


def replay(
    resume: Resume, show: Callable[[ChoiceDelta], object], choices: Sequence[Choices], params: SamplingParams
) -> None:
    """Brings the `choices` of each prompt to where they were when there was of the answer what `resume` says. Calls
    `show` with the deltas of that part."""
    for index, sent in resume.choices.items():
        prompt, choice = divmod(index, params.n)
        for delta in sent.deltas(choice):
            if params.logprobs is not None and not delta.logprobs:  # only their tokens matter then
                delta.logprobs = tuple(TokenLogprob(token_id, 0.0) for token_id in delta.token_ids)
            for shown in choices[prompt].advance([delta], lambda index: None):
                show(shown)


def resumed(resume: Resume, choices: Choices, first_index: int) -> dict[int, Sequence[int]]:
    """Returns the output tokens so far of each unfinished choice of a prompt, whose first choice has `first_index`."""
    begun = resume.choices
    return {
        index: begun[first_index + index].token_ids if first_index + index in begun else ()
        for index in choices.unfinished
    }
