"""Runs plans on one rank: builds the batch, runs the model, samples.

Legend as in `ops/batch.py`: T tokens of the step, S sequences, L rows whose logits are needed.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from qwen3_dist.errors import CheckpointError, QwenDistError, ResourceError
from qwen3_dist.expert_placement import ExpertPlacement
from qwen3_dist.lora_adapters import NextAdapters
from qwen3_dist.model.transformer import Qwen3Model
from qwen3_dist.ops.base import Ops
from qwen3_dist.ops.batch import StepBatch
from qwen3_dist.ops.cuda.compiles import compiled_kernels
from qwen3_dist.ops.transfer import ToHost
from qwen3_dist.parallel.expert_exchange import uses_all_to_all
from qwen3_dist.protocol.sampling_setup import SamplingSetup
from qwen3_dist.protocol.step_plan import StepPlan, StepResult
from qwen3_dist.settings import EngineConfig
from qwen3_dist.weights.version_files import directory_of
from qwen3_dist.weights_version import WeightsVersion
from qwen3_dist.worker import kv_cache
from qwen3_dist.worker.adapter_change import AdapterChange
from qwen3_dist.worker.decode_graphs import DecodeGraphs, can_capture
from qwen3_dist.worker.expert_moves import ExpertMoves
from qwen3_dist.worker.inputs import StepInputs
from qwen3_dist.worker.own_time import OwnTime
from qwen3_dist.worker.sampling.grammar_matcher import Grammars, Matcher
from qwen3_dist.worker.sampling.prompt_outputs import PromptOutputs
from qwen3_dist.worker.sampling.sampler import SampledLogprobs
from qwen3_dist.worker.sampling.sampler_state import Sampled, SamplingState
from qwen3_dist.worker.sleep import SleepingMemory
from qwen3_dist.worker.step_profile import ProfiledSteps
from qwen3_dist.worker.warm_up import StepShapes, explained_failures, warm_up_experts
from qwen3_dist.worker.weight_change import WeightChange


class ModelRunner(ProfiledSteps):
    """One rank's model with its KV cache and the state of running sequences, by slot."""

    def __init__(self, model: Qwen3Model, num_blocks: int, config: EngineConfig, path: Path) -> None:
        """`path` is the directory of the model, whose weights may be from elsewhere."""
        self.model = model
        self._config, self._path = config, path
        self._adapters, self._weights = AdapterChange(model), WeightChange(model, config, path)
        self._moves = self._new_moves()
        self._asleep: SleepingMemory | None = None
        self._device = model.device
        self._parallel, self._tp = model.parallel, model.parallel.tp
        self.own_time = OwnTime(model.parallel)
        self._has_graphs = graphs = config.cuda_graphs and can_capture(model)
        spare = int(graphs or self._device.type == "cuda")  # the spare block, for padding and warm-up
        self._cache = kv_cache.allocate(model, num_blocks + spare, config.block_size)
        self._shapes = StepShapes.of(config, model, num_blocks)
        max_blocks = -(-self._shapes.max_model_len // config.block_size)
        self._inputs = StepInputs(
            self._shapes.max_num_seqs, max_blocks, config.block_size, model.device, num_blocks
        )
        self._grammars: Grammars | None = None
        self._state = self._new_sampling_state()
        with explained_failures(model.device, self._shapes):
            self._graphs = self._make_graphs() if graphs else None
        moe_layers = [*model.moe_layers.values()]
        self.backends = model.ops.describe(moe_layers[0].experts.weights if moe_layers else None)
        if self._cache[0].is_fp8:
            self.backends += ", KV cache in fp8"
        if self._device.type == "cuda":
            self.backends += f", CUDA graphs {'on' if graphs else 'off'}"

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepOutput | None:
        """Starts one step; on a GPU it does not wait for it. Returns the step's output on tp rank 0 of the last stage,
        None on other ranks and for an idle dp group."""
        in_single_tokens = self._graphs is not None and plan.decodes_only
        batch = self._dispatched(self._inputs.batch(plan, in_single_tokens), plan.exact)
        prompt_outputs = None
        if self._graphs is not None and self._graphs.can_run(batch, plan.exact):
            logits = self._graphs.run(batch)
        else:
            hidden, logits = self.model(batch, self._cache)
            if hidden is not None and any(part.prompt_request is not None for part in plan.sequences):
                prompt_outputs = PromptOutputs(self.model, hidden, plan.sequences)
        overflow = self.model.take_overflow() if self._may_overflow(batch, plan.exact) else None
        if not plan.sequences or not self._parallel.pipeline.is_last:
            return None
        drawn = self._draw(plan, logits)
        if logits is None or drawn is None:
            return None
        return StepOutput(plan.step, logits, drawn, prompt_outputs, overflow, self.model.ops)

    @property
    def may_repeat(self) -> bool:
        """Whether a step's result may be void because an all-to-all of fixed capacity overflowed. Under pp the
        capacity is large enough for all rows."""
        layout, dispatch = self._parallel.layout, self._parallel.dispatch
        has_experts = bool(self.model.config.num_experts) and layout.stage_size > 1
        return has_experts and bool(dispatch.by_capacity) and layout.pp == 1

    def _may_overflow(self, batch: StepBatch, exact: bool) -> bool:
        """Whether this step used an all-to-all that may have overflowed; equal on all ranks of a stage."""
        if exact or not self.may_repeat:
            return False
        if self._graphs is not None and self._graphs.can_run(batch, exact):
            return self._graphs.uses_all_to_all(batch)
        return batch.all_to_all

    def _dispatched(self, batch: StepBatch, exact: bool) -> StepBatch:
        """The batch with its dispatcher set. `exact` rules out an all-to-all of fixed capacity."""
        by_all_to_all = not exact and self._by_all_to_all(sum(batch.group_tokens))
        return replace(batch, all_to_all=True) if by_all_to_all else batch

    def _by_all_to_all(self, tokens: int) -> bool:
        """Whether a step of `tokens`, of all dp groups together, dispatches by all-to-all."""
        model, layout = self.model.config, self._parallel.layout
        return uses_all_to_all(self._config, layout, model, tokens, self._device.type)

    def _draw(self, plan: StepPlan, logits: Tensor | None) -> Sampled | None:
        """Samples on tp rank 0, sends the tokens to the other tp ranks, and stores them as inputs of later steps.

        Returns None on the other tp ranks."""
        if self._tp.rank == 0:
            self._state.admit(plan.sequences)
        sampled = [part for part in plan.sequences if part.sample is not None]
        if not sampled:
            return Sampled(self._inputs.last_sampled.new_empty(0), [])
        drawn = self._state.sample(logits, sampled) if logits is not None else None
        if drawn is not None:
            tokens = drawn.tokens
        else:
            tokens = self._inputs.last_sampled.new_empty(sum(1 + part.num_drafted for part in sampled))
        self._inputs.keep_sampled(sampled, self._tp.broadcast(tokens))
        return drawn

    def _new_sampling_state(self) -> SamplingState:
        model = self.model
        return SamplingState(model.config.vocab_size, model.device, self._new_matcher, model.ops)

    def _new_matcher(self, setup: SamplingSetup) -> Matcher:
        """A matcher at the start of the setup's grammar."""
        assert setup.grammar is not None
        return self._grammars_for(setup.eos_token_ids).matcher(setup.grammar)

    def _grammars_for(self, eos_token_ids: tuple[int, ...]) -> Grammars:
        if self._grammars is None:
            self._grammars = Grammars(self._path, self.model.config.vocab_size, eos_token_ids)
        return self._grammars

    @property
    def _samples(self) -> bool:
        """Whether this rank samples, so that it needs grammars."""
        return self._tp.rank == 0 and self._parallel.pipeline.is_last

    def prepare_grammars(self, eos_token_ids: tuple[int, ...]) -> None:
        """Builds the tokenizer trie that all grammars share. This may block steps for a second, so call it at
        start."""
        if self._samples:
            self._grammars_for(eos_token_ids).prepare()

    def build_grammar(self, grammar: str, eos_token_ids: tuple[int, ...]) -> str | None:
        """Builds a grammar in a thread. None until it is built, then "" or the reason why it cannot be used."""
        return self._grammars_for(eos_token_ids).problem(grammar) if self._samples else ""

    @torch.inference_mode()
    def warm_up(self) -> None:
        """On a GPU, runs a step of every kind, so that later steps compile no kernel and fit the card's memory.

        Every rank of a layout must call it before its first plan. All state is reset afterwards. Raises ResourceError.
        """
        if self._device.type == "cuda":
            with explained_failures(self._device, self._shapes):
                self._run_every_kind_of_step()
                torch.cuda.synchronize(self._device)

    def _run_every_kind_of_step(self) -> None:
        moe_layers = [*self.model.moe_layers.values()]
        repeated = self._shapes.repeated() if self.may_repeat else ()
        for plans in chain(self._shapes.steps(), repeated):
            output = self.launch(plans[self._parallel.coords.group])
            if output is not None:
                output.result()
        # In deterministic mode any number of rows has compiled all kernels.
        if moe_layers and not self._parallel.deterministic:
            moe = moe_layers[0]  # all are of one shape
            warm_up_experts(moe.experts, moe.num_experts_per_tok, self.model.activation_template)
        for moe in moe_layers:
            moe.reset_counts()
        self._inputs.last_sampled.zero_()
        self._state = self._new_sampling_state()

    def read_own_time(self) -> tuple[int, float] | None:
        """What `OwnTime.read` says of the steps since the start."""
        return self.own_time.read()

    def compiled_kernels(self) -> int:
        """Variants of Triton kernels compiled in this rank's process so far."""
        return compiled_kernels()

    def expert_counts(self) -> dict[int, dict[int, int]]:
        """The number of rows that each expert of this rank has computed so far, by layer."""
        return {layer: moe.rows_by_expert() for layer, moe in self.model.moe_layers.items()}

    def prepare_experts(self, layer: int, placement: ExpertPlacement) -> None:
        """Starts to read the experts that `move_experts` needs for `placement`, while steps go on."""
        self._moves.start(layer, placement)

    def experts_arrived(self) -> bool | CheckpointError:
        """Whether the experts of `prepare_experts` have been read; the error if they cannot be read."""
        try:
            return self._moves.arrived
        except CheckpointError as error:
            return error

    def move_experts(self) -> None:
        """Switches to the placement and the experts of `prepare_experts`, from the next step on."""
        self._moves.finish()

    def drop_experts(self) -> None:
        """Undoes `prepare_experts`: experts stay where they are."""
        self._moves.drop()

    def prepare_adapters(self, to: NextAdapters) -> None:
        """Starts to read the LoRA adapters that `use_adapters` needs, while steps go on."""
        self._adapters.start(to)

    def adapters_arrived(self) -> bool | QwenDistError:
        """Whether the adapters of `prepare_adapters` have been read; the error if they cannot be."""
        return self._adapters.arrived

    def use_adapters(self) -> None:
        """Switches to the adapters of `prepare_adapters`, from the next step on."""
        self._adapters.finish()

    def drop_adapters(self) -> None:
        """Undoes `prepare_adapters`."""
        self._adapters.drop()

    def open_weights(self, weights: WeightsVersion) -> None:
        """Starts to check whether these weights fit, while steps go on."""
        self._weights.open(weights)

    def weights_opened(self) -> bool | QwenDistError:
        """Whether the weights of `open_weights` fit; the error if they do not."""
        return self._weights.opened

    def drop_weights(self) -> None:
        """Undoes `open_weights`."""
        self._weights.drop()

    def load_weights(self) -> None:
        """Starts to load the weights of `open_weights` into place. No step may run until they are there."""
        self._weights.load()

    def weights_loaded(self) -> bool | QwenDistError:
        """Whether the weights of `load_weights` are there; the error if they cannot be loaded."""
        return self._weights.loaded

    def finish_weights(self) -> int:
        """Ends `load_weights`. Returns the bytes that were loaded."""
        self._moves = self._new_moves()
        return self._weights.finish()

    def _new_moves(self) -> ExpertMoves:
        """Moves of experts, which are read from the files of the weights of now."""
        weights, config = self.model.weights or self._config.weights, self._config
        random = config.load_format == "random" and not weights.path
        return ExpertMoves(self.model, directory_of(weights, self._path), random)

    def sleep(self, level: int) -> None:
        """Gives up memory as `SleepingMemory` says, unless it could not wake. No step may run until `wake`."""
        self._weights.close()  # a rank may still load what another could not
        self._graphs = None
        self._asleep = self._asleep or SleepingMemory(self.model, self._cache, level)

    @torch.inference_mode()
    def wake(self) -> str:
        """Takes the memory again; returns what lacks, if it sleeps on. After level 2 weights must be loaded next."""
        assert self._asleep is not None, "sleep comes first"
        problem = self._asleep.wake()
        self._asleep = self._asleep if problem else None
        return problem

    def wake_graphs(self) -> None:
        """Captures the CUDA graphs again, in which memory has other addresses. Every rank must call it."""
        self._graphs = self._make_graphs() if self._has_graphs else None

    @torch.inference_mode()
    def _make_graphs(self) -> DecodeGraphs:
        max_rows = self._shapes.max_num_seqs * (1 + self._shapes.num_drafted)
        return DecodeGraphs(self.model, self._cache, max_rows, self._inputs.tables, self._by_all_to_all)

    def close(self, keeps_model: bool = False) -> None:
        """Drops the CUDA graphs, before process groups are left (NCCL keeps a communicator that a graph has captured),
        and the KV cache. With `keeps_model` a model that sleeps takes its memory again: raises ResourceError if there
        is too little."""
        self._graphs = None
        self._weights.close()
        if keeps_model and self._asleep is not None and (problem := self.wake()):
            raise ResourceError(problem)
        del self._state  # it refers to this runner; nothing frees a cycle in a frozen heap

    def run(self, plan: StepPlan) -> StepResult | None:
        """Runs one step and returns its result, or None where `launch` returns None."""
        return None if (output := self.launch(plan)) is None else output.result()


class StepOutput:
    """The tokens, logprobs and prompt outputs of a launched step, which are being copied to the host."""

    def __init__(
        self,
        step: int,
        logits: Tensor,
        sampled: Sampled,
        prompt_outputs: PromptOutputs | None,
        overflow: Tensor | None,
        ops: Ops,
    ) -> None:
        """`overflow` [1] is above 0 if the step is void."""
        self._step = step
        self._prompt_outputs = prompt_outputs
        self._logprobs = SampledLogprobs(
            logits, sampled.tokens, sampled.specs, ops, sampled.logprob_token_ids
        )
        self._errors = tuple(sampled.errors.items())
        self._tokens = ToHost(sampled.tokens, *([] if overflow is None else [overflow]))

    def ready(self) -> bool:
        """Whether `result` returns without waiting."""
        return self._tokens.ready()

    def result(self) -> StepResult:
        """Waits for the device and returns the result."""
        tokens, *overflow = self._tokens.arrived()  # copies that were started earlier have ended too
        prompt_outputs = self._prompt_outputs.on_host() if self._prompt_outputs is not None else ()
        overflowed = any(flag.item() > 0 for flag in overflow)
        return StepResult(
            self._step,
            tuple(tokens.tolist()),
            self._logprobs.on_host(),
            self._errors,
            prompt_outputs,
            overflowed,
        )
