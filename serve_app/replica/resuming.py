"""Goes on with a stream that another replica began."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from http import HTTPStatus

from qwen3_dist.errors import RequestError
from qwen3_dist.protocol.outputs import TokenDelta, TokenLogprob
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.text.choice import Choices
from serve_app.apis.shared.answer import Answer
from serve_app.apis.shared.resume import Resume, Sent


def sent_of(deltas: Iterable[TokenDelta], first_index: int, with_logprobs: bool) -> Sent:
    """Returns what `deltas` of a prompt, whose first choice has `first_index`, add to what the client has."""
    return (
        *[
            (
                first_index + d.index,
                d.token_ids,
                d.finish_reason,
                d.num_cached_tokens,
                d.logprobs if with_logprobs else (),
            )
            for d in deltas
        ],
    )


def check_model(resume: Resume, model: str) -> None:
    """Raises RequestError if another checkpoint than `model` began the stream."""
    if resume.model not in ("", model):
        raise RequestError(
            "the answer cannot go on: the model was changed while it was generated; send the request again",
            param="model",
            status=HTTPStatus.CONFLICT,
        )


def replay(resume: Resume, answer: Answer, choices: Sequence[Choices], params: SamplingParams) -> None:
    """Brings `answer` and the `choices` of each prompt to where they were when the client had what `resume` says, by
    making its events again."""
    answer.begin()
    for index, sent in resume.choices.items():
        prompt, choice = divmod(index, params.n)
        for delta in sent.deltas(choice):
            if params.logprobs is not None and not answer.repeats_logprobs:  # only their tokens matter then
                delta.logprobs = tuple(TokenLogprob(token_id, 0.0) for token_id in delta.token_ids)
            for shown in choices[prompt].advance([delta], lambda index: None):
                answer.count(shown)
                answer.delta(shown)


def resumed(resume: Resume, choices: Choices, first_index: int) -> dict[int, Sequence[int]]:
    """Returns the output tokens so far of each unfinished choice of a prompt, whose first choice has `first_index`."""
    begun = resume.choices
    return {
        index: begun[first_index + index].token_ids if first_index + index in begun else ()
        for index in choices.unfinished
    }
