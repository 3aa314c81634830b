"""Embeddings and relevance against transformers, whatever steps compute them and on whatever ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from qwen3_dist import LLM, SamplingParams
from qwen3_dist.engine.engine import PROMPT_ONLY
from qwen3_dist.errors import CheckpointError, RequestError
from qwen3_dist.model.reference import load_reference
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.text.reranking import relevance_prompt
from tests.adapters import merge, write_adapter
from tests.checkpoints import write_reader

SHARED = list(range(20, 46))
PROMPTS = [[*SHARED, 60 + i, 3] for i in range(5)] + [[9], [7, 8], list(range(100, 133))]
RAW = PoolingParams(normalize=False)
pytestmark = pytest.mark.usefixtures("nursery")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_reader(tmp_path_factory.mktemp("reader"), ending="<|endoftext|>")
    with LLM(str(path), dtype="float32", num_blocks=256, use_tqdm=False) as llm:
        yield llm


@torch.inference_mode()
def states(path: Path, prompts: list[list[int]]) -> torch.Tensor:
    """[prompts, emb_dim]: transformers' last hidden state of each one's last token."""
    model = AutoModel.from_pretrained(path, dtype=torch.float32)
    return torch.stack([model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts])


def close(ours: Any, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "layout", "blocks"),
    [
        ("dense", "tp=1", 24),
        ("dense", "tp=2", 24),
        ("dense", "pp=2", 24),
        ("moe", "tp=2,ep=2", 24),
        ("moe", "dp=2,ep=2", 17),  # of each group, which has half the sequences
    ],
)
def test_every_layout_pools_beside_generation_through_chunks_preemption_and_the_prefix_cache(
    checkpoints: dict[str, Path], kind: str, layout: str, blocks: int
) -> None:
    path, form = checkpoints[kind], "in_process" if layout == "tp=1" else "processes"
    greedy = SamplingParams(max_tokens=14, temperature=0, ignore_eos=True)
    asked = PoolingParams(logits_of=(5, 190, 0))
    settings: dict[str, Any] = {"block_size": 4, "num_blocks": blocks, "max_num_batched_tokens": 16}
    with LLM(str(path), layout=layout, executor=form, max_num_seqs=6, use_tqdm=False, **settings) as llm:
        engine = llm._engine
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(f"t{number}", prompt, greedy)
            engine.add_request(f"v{number}", prompt, PROMPT_ONLY, pooling=RAW)
            engine.add_request(f"l{number}", prompt, PROMPT_ONLY, pooling=asked)
        vectors: dict[str, list[float]] = {}
        tokens: dict[str, list[int]] = {}
        while engine.has_work:
            for request_id, deltas in engine.step().items():
                for delta in deltas:
                    tokens.setdefault(request_id, []).extend(delta.token_ids)
                    if delta.vector is not None:
                        vectors[request_id] = list(delta.vector)
        engine.check_integrity()
        stats = engine.stats()
    assert stats.preemptions > 0 and stats.cached_prompt_tokens > 0
    assert stats.free_blocks == stats.total_blocks
    reference = load_reference(path)
    numbers = range(len(PROMPTS))
    close([vectors[f"v{n}"] for n in numbers], states(path, PROMPTS))
    logits = torch.stack([reference(torch.tensor(prompt))[-1, [5, 190, 0]] for prompt in PROMPTS])
    close([vectors[f"l{n}"] for n in numbers], logits)
    assert [tokens[f"t{n}"] for n in numbers] == [reference.generate_greedy(p, 14) for p in PROMPTS]
    assert not any(tokens[f"v{n}"] + tokens[f"l{n}"] for n in numbers)


def test_vectors_have_length_1_after_they_were_cut(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["dense"]
    expected = states(path, PROMPTS)
    with LLM(str(path), use_tqdm=False) as llm:
        close(llm.embed(PROMPTS), torch.nn.functional.normalize(expected, dim=-1))
        close(llm.embed(PROMPTS, dimensions=10), torch.nn.functional.normalize(expected[:, :10], dim=-1))
        close(llm.embed(PROMPTS, dimensions=10, normalize=False), expected[:, :10])
        assert llm.embed([]) == []


@pytest.mark.parametrize("dimensions", [0, -1, 65, 1.5, True, "8"])
def test_dimensions_that_the_model_has_not_are_refused(checkpoints: dict[str, Path], dimensions: Any) -> None:
    with LLM(str(checkpoints["dense"]), num_blocks=8, use_tqdm=False) as llm:
        with pytest.raises(RequestError, match="dimensions") as error:
            llm.embed([1, 2], dimensions=dimensions)
        assert error.value.param == "dimensions" and not llm._engine.has_work


def test_a_prompt_may_fill_the_context(checkpoints: dict[str, Path]) -> None:
    full = list(range(64))
    with LLM(str(checkpoints["dense"]), max_model_len=64, num_blocks=4, use_tqdm=False) as llm:
        close(llm.embed([full], normalize=False), states(checkpoints["dense"], [full]))
        with pytest.raises(RequestError, match="65 tokens and the context holds 64; shorten"):
            llm.embed([*full, 1])


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_without_a_head_and_its_prefix_is_read_as_qwen3_embedding_has_it(
    checkpoints: dict[str, Path], tmp_path: Path, tied: bool
) -> None:
    AutoModel.from_pretrained(checkpoints["dense"]).save_pretrained(tmp_path, max_shard_size="100KB")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {"embed_tokens.weight", "norm.weight"} < set(index["weight_map"])
    for layout, form in (("tp=1", "in_process"), ("pp=2", "processes")):
        with LLM(str(tmp_path), layout=layout, executor=form, num_blocks=64, use_tqdm=False) as llm:
            close(llm.embed(PROMPTS, normalize=False), states(checkpoints["dense"], PROMPTS))


def test_a_head_that_is_missing_elsewhere_is_still_missed(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["dense"])
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor \(lm_head.weight\) .*; download the weights"):
        LLM(str(tmp_path), use_tqdm=False)


def test_an_adapter_changes_the_vector_as_merging_it_does(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", checkpoints["dense"])
    merged = merge(tmp_path / "merged", checkpoints["dense"], adapter)
    with LLM(str(checkpoints["dense"]), lora=[f"a={adapter}"], num_blocks=64, use_tqdm=False) as llm:
        plain, adapted = llm.embed([SHARED, SHARED], lora=[None, "a"], normalize=False)
    close([plain], states(checkpoints["dense"], [SHARED]))
    close([adapted], states(merged, [SHARED]))


def test_a_text_is_embedded_and_generated_from_with_what_the_tokenizer_puts_after_it(
    reader: LLM,
) -> None:
    tokenizer = reader._engine.tokenizer
    assert tokenizer is not None
    end = tokenizer.token_id("<|endoftext|>")
    assert tokenizer.encode("the sea", add_special_tokens=True) == [*tokenizer.encode("the sea"), end]
    assert reader.embed("the sea") == reader.embed([*tokenizer.encode("the sea"), end])
    [output] = reader.generate("the sea", SamplingParams(max_tokens=1))
    assert output.prompt_token_ids == [*tokenizer.encode("the sea"), end]


def test_relevance_is_the_chance_of_yes_against_no(reader: LLM) -> None:
    documents = ["Foxes are small.", "The sea is blue.", "The sea is blue."]
    scores = reader.rerank("What colour is the sea?", documents)
    tokenizer, model = reader._engine.tokenizer, load_reference(reader._engine.model_path)
    assert tokenizer is not None
    answers = [tokenizer.token_id("yes"), tokenizer.token_id("no")]
    for score, document in zip(scores, documents, strict=True):
        prompt = tokenizer.encode(relevance_prompt("What colour is the sea?", document))
        expected = model(torch.tensor(prompt))[-1, answers].softmax(dim=0)[0]
        assert score == pytest.approx(float(expected), abs=1e-4)
    assert scores[1] == pytest.approx(scores[2]) and scores[0] != pytest.approx(scores[1], rel=1e-3)
    assert reader.rerank("q", ["d"], "Find jokes") != reader.rerank("q", ["d"])


def test_a_model_whose_tokenizer_lacks_yes_is_told_apart() -> None:
    with LLM(num_blocks=64, use_tqdm=False) as llm, pytest.raises(RequestError, match='no tokens "yes"'):
        llm.rerank("q", ["d"])
