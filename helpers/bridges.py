"""Our questions and our reward in other trainers: TRL with or without vLLM, verl, and prime-rl (`verifiers`)."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.prompts import messages
from helpers.rewards import Reward, RewardConfig
from helpers.tasks import Example, Task, load_task

if TYPE_CHECKING:  # verl and prime-rl import this file for the reward, which needs neither torch nor transformers
    from helpers.grpo import GRPOConfig

# --- TRL ---


def trl_dataset(task: Task):
    """The task as a `datasets.Dataset`: `prompt`, the chat, and `example`, which `Reward` reads as a column."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": messages(e.question), "example": asdict(e)} for e in task])


def trl_config(config: "GRPOConfig", **more: Any):
    """Our settings under TRL's names; `more` are TRL's own, and win.

    A step of ours fills a buffer; TRL counts updates, so its max_steps is steps x updates a step. Nothing is left to
    TRL's defaults that differ from ours: bfloat16, gradient checkpointing, a learning rate that falls to 0.
    With `use_vllm=True`, our `loss.correction` is its vllm_importance_sampling_mode. One difference stays: where a pass
    over the buffer makes several updates, TRL's dapo and cispo divide by the tokens of a mean update, not of this one.
    Raises ValueError, in one sentence, for what TRL has no word for.
    Source: TRL 1.16, `GRPOConfig` and `TrainingArguments`.
    """
    from trl import GRPOConfig as TrlConfig

    loss, group = config.loss, config.questions_per_rollout * config.group_size
    rows = -(-config.buffer_size // group) * group  # whole rollouts
    mini = min(config.minibatch_size, rows)
    accumulated = min(config.gradient_accumulation, max(1, rows // mini))
    even = math.lcm(group, config.minibatch_size * config.gradient_accumulation)
    unequal = rows % (mini * accumulated) != 0
    whole = -(-rows // even) * even if unequal else rows  # a size of the buffer that TRL can divide
    uneven = (f"({rows} responses a step, {mini} a minibatch, {accumulated} of these an update; set buffer_size to "
              f"{whole}, a multiple of {even})")  # fmt: skip
    lacking = {
        "a loop without steps": config.steps == 0,
        "questions drawn by their answers (leave out stratified)": config.stratified,
        "advantages divided by the mean reward (set scale to group)": config.scale == "mean",
        f"the std over each of several rollouts (set scale to group, or questions_per_rollout to "
        f"{whole // config.group_size})": config.scale == "batch" and rows > group,
        "an advantage a step (leave out credit)": config.credit == "step",
        "a temperature that changes (leave out later_temperature)": config.later_temperature is not None,
        "the population std (set std_ddof to 1)": config.std_ddof == 0,
        "a KL that is measured only (leave out measure_kl, or set beta above 0)": config.measure_kl and not loss.beta,
        f"updates of unequal size {uneven}": unequal,
        "a correction for any sampler but vLLM (pass use_vllm=True)": loss.correction and not more.get("use_vllm"),
    }
    if any(lacking.values()):
        raise ValueError(f"TRL has no word for {', nor for '.join(what for what, asked in lacking.items() if asked)}.")
    updates = config.updates_per_buffer * (rows // (mini * accumulated))
    settings = {
        "max_steps": config.steps * updates,
        "generation_batch_size": rows,
        "num_generations": config.group_size,
        "num_iterations": config.updates_per_buffer,
        "per_device_train_batch_size": mini,
        "gradient_accumulation_steps": accumulated,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": config.max_grad_norm,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": 0,
        "max_completion_length": config.max_new_tokens,
        "scale_rewards": config.scale,
        "loss_type": loss.loss_type,
        "importance_sampling_level": loss.importance,
        "epsilon": loss.epsilon_low,
        "epsilon_high": loss.epsilon_high,
        "beta": loss.beta,
        "entropy_coef": loss.entropy_coefficient,
        "use_bias_correction_kl": loss.kl_correction,
        "vllm_importance_sampling_correction": loss.correction is not None,
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": False,
        "save_steps": config.checkpoint_every * updates,
        "logging_steps": updates,
        "report_to": "none",
    }
    if loss.correction:
        settings |= {"vllm_importance_sampling_mode": loss.correction,
                     "vllm_importance_sampling_clip_max": loss.correction_cap}  # fmt: skip
    return TrlConfig(**settings | more)


def trl_trainer(policy, tokenizer, task: Task, config: "GRPOConfig", reward: Reward | None = None, **more: Any):
    """TRL's GRPOTrainer with our policy, questions, reward and settings; `more` as for `trl_config`.

    Raises ValueError for a KL with all weights trained: TRL would load the reference anew by the model's name, which
    is not the policy after its warm-up. With LoRA it copies the adapter, as we do.
    """
    from trl import GRPOTrainer

    if config.loss.beta > 0 and not hasattr(policy, "peft_config"):
        raise ValueError("TRL's reference would not be this policy: train LoRA adapters, or set loss.beta to 0.")
    return GRPOTrainer(
        policy, args=trl_config(config, **more), processing_class=tokenizer, reward_funcs=reward or Reward(task),
        train_dataset=trl_dataset(task),
    )  # fmt: skip


# --- verl ---


def verl_rows(task: Task) -> list[dict[str, Any]]:
    """The task as verl's five columns; `write_verl` makes the file of them.

    The metadata that the verifier needs is one JSON string: Parquet gives every row the same fields, and lists come
    back as arrays. Source: verl 0.9, `docs/preparation/prepare_data.rst`.
    """
    return [
        {
            "data_source": task.name,
            "prompt": messages(example.question),
            "ability": "reasoning",
            "reward_model": {"style": "rule", "ground_truth": example.answer},
            "extra_info": {
                "split": task.split,
                "index": index,
                "question": example.question,
                "metadata": json.dumps(example.metadata, ensure_ascii=False),
            },
        }
        for index, example in enumerate(task)
    ]


def write_verl(task: Task, folder: str | Path) -> Path:
    """Write the task as `train.parquet` or `test.parquet`, whichever its split is, for verl's data.train_files."""
    from datasets import Dataset

    path = Path(folder) / f"{task.split}.parquet"
    Dataset.from_list(verl_rows(task)).to_parquet(path)
    return path


@cache
def verifier(name: str) -> Task:
    """A task with little more than its verifier, by name; made once."""
    return load_task(name, size=1)


def compute_score(
    data_source: str, solution_str: Any, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, float]:
    """Our reward as verl calls it, by keyword: `score` is the total, `acc`, `format`, `length` ... are its parts.

    A completion that is no text gets what an empty one gets. more: weights of `RewardConfig`, verl's reward_kwargs;
    the rest is ignored. Raises ValueError for a row that `verl_rows` has not made.
    Source: verl 0.9, `docs/preparation/reward_function.rst` and its naive reward manager.
    """
    try:
        metadata = json.loads((extra_info or {})["metadata"])
        example = Example((extra_info or {}).get("question", ""), str(ground_truth), metadata)
    except (KeyError, TypeError, ValueError):
        raise ValueError("verl's row lacks extra_info.metadata: write the Parquet file with write_verl.") from None
    weights = {f.name: more[f.name] for f in fields(RewardConfig) if f.name in more}
    text = solution_str if isinstance(solution_str, str) else ""
    parts = Reward(verifier(data_source), RewardConfig(**weights)).parts(text, example)
    return {"score": parts.pop("total"), "acc": parts.pop("correct"), **parts}


# --- verifiers, for prime-rl: see `helpers.taskset` ---


def chat_fields(task: Task) -> list[dict[str, Any]]:
    """Each question as the fields of `taskset.QuestionData`: the two messages apart, as `verifiers` takes them."""
    rows = []
    for example in task:
        system, user = messages(example.question)
        rows.append({"system_prompt": system["content"], "prompt": user["content"], "task": task.name})
        rows[-1] |= asdict(example)
    return rows
