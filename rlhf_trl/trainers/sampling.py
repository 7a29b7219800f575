"""Sampling settings under which completions come from another distribution than the one that scores them."""

from typing import Any

from rlhf_trl.trainers.rollout_hook import RolloutTrainer

# Options of `transformers.GenerationConfig` that change probabilities, with the values at which they don't. The
# temperature isn't among them: TRL divides the logits by it in every log-probability.
NEUTRAL: dict[str, tuple] = {
    "do_sample": (True,),
    "num_beams": (1,),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ((),),
    "sequence_bias": (),
    "suppress_tokens": ((),),
    "begin_suppress_tokens": ((),),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
}


def sampling_differences(trainer: RolloutTrainer) -> list[str]:
    """
    Return what makes the completions of a trainer come from another distribution than the log-probabilities that it
    scores them with: sampling settings away from their neutral value, a rollout function, vLLM, dropout.

    Args:
        trainer ([`PPOTrainer`], or one of [`rlhf_trl.trainers.rollouts`]).

    Returns:
        `list[str]`: as they would be set (`top_k=1`), or in words; empty where nothing is known to differ.
    """
    found = biasing_settings(trainer.args)
    if getattr(trainer, "rollout_func", None) is not None:
        found.append("a `rollout_func` that makes the completions")
    elif trainer.args.use_vllm:
        found.append("vLLM, whose probabilities are not exactly the policy's")
    config = trainer.accelerator.unwrap_model(trainer.model).config
    if not trainer.args.disable_dropout and _has_dropout(config.to_dict()):
        found.append("dropout (`disable_dropout=false`)")
    return found


def biasing_settings(args: Any) -> list[str]:
    """Return the sampling settings of a trainer that are away from their neutral value, as they would be set."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    settings = {name: getattr(args, name) for name in names} | (args.generation_kwargs or {})
    found = [
        f"`{name}={settings[name]}`"
        for name, neutral in NEUTRAL.items()
        if settings.get(name) is not None and _plain(settings[name]) not in neutral
    ]
    if settings["temperature"] != args.temperature:
        found.append(f"a sampling `temperature={settings['temperature']}` beside `{args.temperature}`")
    return found


def _has_dropout(config: dict[str, Any]) -> bool:
    return any(
        _has_dropout(value)
        if isinstance(value, dict)
        else "drop" in str(name) and isinstance(value, int | float) and value > 0
        for name, value in config.items()
    )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
