"""Names of fields of a config.json: those that are read, and those without effect on a model's outputs."""

from __future__ import annotations

# Read beside the sizes that `qwen3_dist.config` translates.
READ = {
    "model_type", "architectures", "hidden_act", "is_causal", "use_bidirectional_attention",
    "dual_chunk_attention_config", "max_window_layers", "use_sliding_window", "layer_types",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings",
    "quantization_config", "compression_config",
}  # fmt: skip
# transformers' fields for training, for other tasks, and for its own implementation; token ids, which are read from
# the same file elsewhere; and notes of the tools that wrote the file.
NO_EFFECT = {
    "_name_or_path", "name_or_path", "transformers_version", "auto_map", "custom_pipelines", "torchscript",
    "return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "output_router_logits", "router_aux_loss_coef", "use_cache", "attention_dropout", "hidden_dropout",
    "initializer_range", "gradient_checkpointing", "pruned_heads", "chunk_size_feed_forward", "use_bfloat16",
    "tf_legacy_loss", "is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size",
    "tie_encoder_decoder", "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id",
    "num_labels", "tokenizer_class", "prefix", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_experts_implementation", "pretraining_tp", "unsloth_fixed", "unsloth_version", "unsloth_training_version",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id",
}  # fmt: skip
