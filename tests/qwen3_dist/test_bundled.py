"""The bundled checkpoint is real HuggingFace format, small, and talks, the same in every layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from qwen3_dist import LLM, ModelConfig, SamplingParams
from qwen3_dist.layout import valid_layouts
from qwen3_dist.model.reference import load_reference
from qwen3_dist.text.chat_template import ChatTemplate
from qwen3_dist.text.tokenizer import Tokenizer, read_generation_defaults

REPO = Path(__file__).resolve().parents[2]
BUNDLED = REPO / "qwen3_dist" / "bundled"
REAL = REPO.parent / "shared" / "data" / "qwen3-tokenizer"
GREEDY = SamplingParams(max_tokens=120, temperature=0)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
pytestmark = pytest.mark.usefixtures("nursery")


def bundled_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_directory(BUNDLED)
    assert tokenizer is not None
    return tokenizer


def prompt(question: str, thinking: bool, tools: list[dict[str, object]] | None = None) -> str:
    template = ChatTemplate.from_directory(BUNDLED)
    assert template is not None
    messages = [{"role": "user", "content": question}]
    return template.render(messages, tools=tools, **({} if thinking else {"enable_thinking": False}))


PROMPTS = [
    prompt("Hello!", thinking=False),
    prompt("What is 47 + 38?", thinking=True),
    prompt("What is the weather in Paris?", thinking=False, tools=[WEATHER]),
    prompt("Tell me a story about a fox.", thinking=False),
]


@pytest.fixture(scope="module")
def answers() -> list[str]:
    with LLM(dtype="float32", use_tqdm=False, num_blocks=512) as llm:
        return [output.text or "" for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_it_greets_adds_and_calls_a_tool(answers: list[str]) -> None:
    greeting, worked_sum, call, story = answers
    assert greeting.startswith("Hello")
    assert re.fullmatch(r"<think>\n.+\n</think>\n\n47 \+ 38 = 85", worked_sum, re.DOTALL)
    body = re.fullmatch(r"<tool_call>\n(.+)\n</tool_call>", call)
    assert body and json.loads(body[1]) == {"name": "get_weather", "arguments": {"city": "Paris"}}
    assert len(story.split()) > 20


LAYOUTS = [
    *(str(layout) for n in (1, 2) for layout in valid_layouts(ModelConfig.from_directory(BUNDLED), n)),
    *("tp=4,ep=4", "tp=2,dp=2,ep=4", "dp=4,ep=2", "tp=2,pp=2,ep=2"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_answers(answers: list[str], layout: str) -> None:
    form = "in_process" if layout == "tp=1" else "processes"
    with LLM(layout=layout, executor=form, dtype="float32", use_tqdm=False, num_blocks=512) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [output.text for output in outputs] == answers


def test_its_logits_are_those_of_transformers() -> None:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        BUNDLED, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    reference = load_reference(BUNDLED)
    for text in PROMPTS:
        ids = torch.tensor(bundled_tokenizer().encode(text))
        with torch.no_grad():
            expected = model.eval()(ids[None]).logits[0]
        assert torch.allclose(reference(ids), expected, atol=1e-4, rtol=1e-4)


def test_its_config_reads_as_a_small_moe_with_one_dense_layer() -> None:
    config = ModelConfig.from_directory(BUNDLED)
    assert (config.num_experts, config.num_experts_per_tok, config.n_kv_groups) == (8, 2, 2)
    assert (config.context_length, config.rope_base, config.dtype) == (4096, 1e6, "bfloat16")
    assert (config.tie_word_embeddings, config.norm_topk_prob, config.qk_norm) == (True, True, True)
    assert [config.is_moe_layer(layer) for layer in range(5)] == [False, True, True, True, True]


def test_the_whole_folder_stays_under_sixteen_megabytes() -> None:
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) < 16e6


def test_its_card_holds_what_was_measured() -> None:
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    assert "| addition, 2 digits, directly |" in card and "Share of tokens that each expert gets" in card


def test_its_tokenizer_fills_the_models_vocabulary_and_knows_what_ends_a_turn() -> None:
    tokenizer = bundled_tokenizer()
    assert tokenizer.vocab_size == ModelConfig.from_directory(BUNDLED).vocab_size
    assert tokenizer.eos_token_ids == (tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|endoftext|>"))
    assert read_generation_defaults(BUNDLED) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


@pytest.mark.skipif(not REAL.exists(), reason="the real Qwen3 tokenizer is not at hand")
def test_its_tokenizer_is_built_like_the_real_one() -> None:
    ours, real = (json.loads((d / "tokenizer.json").read_text(encoding="utf-8")) for d in (BUNDLED, REAL))
    assert [{**token, "id": None} for token in ours["added_tokens"]] == [
        {**token, "id": None} for token in real["added_tokens"]
    ]
    assert ours["normalizer"] == real["normalizer"]


def test_a_word_is_one_token_wherever_it_stands() -> None:
    """Unlike Qwen3's: a space or an underscore never joins a word, so that a small model can copy it."""
    tokenizer = bundled_tokenizer()
    for text in ("city", " city", "_city", '"city"', "city_"):
        assert tokenizer.encode("city")[0] in tokenizer.encode(text)
