"""Our reward and questions in other trainers, called the way those trainers call them."""

import ast
import asyncio
import importlib.util
import math
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOConfig as TrlConfig

from helpers import bridges
from helpers.bridges import chat_fields, compute_score, trl_config, trl_dataset, trl_trainer, verl_rows, write_verl
from helpers.grpo import GRPOConfig
from helpers.losses import LossConfig, group_advantages
from helpers.parity import Comparison, compare_with_trl
from helpers.prompts import completion, messages
from helpers.recipes import load_recipe
from helpers.rewards import Reward, RewardConfig
from helpers.tasks import TASK_NAMES, Example, load_task
from helpers.tests.test_losses import trl_advantages

MALFORMED = ["", "<answer>", "Yes", "</think><answer>1</answer>", "<think>\x00</think>\n<answer>\udfff</answer>"]


def replies(task, example) -> list[str]:
    """Right, wrong and malformed completions, the right answer among the malformed ones too."""
    return [
        completion(task.thinking(example), example.answer),
        completion(task.thinking(example), "neither"),
        f"<answer> {example.answer} </answer>",
        *MALFORMED,
    ]


# --- TRL: settings ---


@pytest.mark.parametrize("name", ["pocket", "smollm2-135m-cpu", "smollm2-135m-gpu"])
def test_recipes_have_a_word_in_trl(name, tmp_path):
    config = load_recipe(name).grpo
    theirs = trl_config(config, output_dir=str(tmp_path))
    assert theirs.generation_batch_size == config.buffer_size and theirs.num_generations == config.group_size
    assert theirs.steps_per_generation * theirs.per_device_train_batch_size == config.buffer_size
    assert theirs.max_steps == config.steps * config.updates_per_buffer * math.ceil(
        config.buffer_size / (config.minibatch_size * config.gradient_accumulation)
    )
    assert (theirs.learning_rate, theirs.temperature, theirs.top_p) == (
        config.learning_rate, config.temperature, config.top_p,
    )  # fmt: skip
    assert theirs.lr_scheduler_type == "constant" and theirs.weight_decay == 0 and not theirs.bf16


def test_the_article_s_buffer_has_no_word_in_trl():
    """33 minibatches, 12 an update: the last update is of 9."""
    with pytest.raises(ValueError, match="528 responses a step, 16 a minibatch, 12 of these an update"):
        trl_config(load_recipe("article-smollm-135m").grpo)


OTHER = GRPOConfig(
    steps=7, questions_per_rollout=4, group_size=4, buffer_size=16, updates_per_buffer=3, minibatch_size=4,
    gradient_accumulation=2, learning_rate=3e-4, temperature=0.6, top_p=0.8, max_new_tokens=77, scale="batch",
    max_grad_norm=0.5, gradient_checkpointing=True, checkpoint_every=5,
    loss=LossConfig("cispo", "sequence", 0.11, 4.5, 0.03, 0.02, True, correction="token_mask", correction_cap=2.5),
)  # fmt: skip


def test_every_setting_reaches_trl(tmp_path):
    theirs = trl_config(OTHER, output_dir=str(tmp_path), use_vllm=True)
    assert theirs.max_steps == 7 * 3 * 2 and theirs.num_iterations == 3
    assert (theirs.generation_batch_size, theirs.num_generations, theirs.per_device_train_batch_size) == (16, 4, 4)
    assert (theirs.gradient_accumulation_steps, theirs.steps_per_generation) == (2, 4)
    assert (theirs.learning_rate, theirs.temperature, theirs.top_p, theirs.top_k) == (3e-4, 0.6, 0.8, 0)
    assert (theirs.max_completion_length, theirs.scale_rewards, theirs.max_grad_norm) == (77, "batch", 0.5)
    assert (theirs.loss_type, theirs.importance_sampling_level) == ("cispo", "sequence")
    assert (theirs.epsilon, theirs.epsilon_high, theirs.beta, theirs.entropy_coef) == (0.11, 4.5, 0.03, 0.02)
    assert theirs.use_bias_correction_kl and theirs.gradient_checkpointing and theirs.save_steps == 5 * 6


def test_no_setting_is_forgotten(tmp_path):
    """Each of our settings, changed alone, changes TRL's, or is refused: a new one cannot be left out unnoticed."""

    def told(config: GRPOConfig) -> dict:
        try:
            return trl_config(config, output_dir=str(tmp_path), use_vllm=True).to_dict()
        except ValueError as error:
            return {"refused": str(error)}

    base = replace(OTHER, loss=LossConfig())
    other = {f.name: getattr(OTHER, f.name) for f in fields(GRPOConfig)} | {
        "questions_per_rollout": 3, "buffer_size": 96, "std_ddof": 0, "measure_kl": True, "scale": "none",
        "stratified": True, "credit": "step", "later_temperature": 1.3,
    }  # fmt: skip
    for f in fields(GRPOConfig):
        if f.name not in ("loss", "later_after"):  # the second without later_temperature, which is refused, is idle
            start = replace(GRPOConfig(), updates_per_buffer=2)
            assert other[f.name] != getattr(start, f.name), f.name
            assert told(replace(start, **{f.name: other[f.name]})) != told(start), f.name
    for f in fields(LossConfig):
        start = LossConfig(correction="sequence_mask")
        changed = replace(start, **{f.name: getattr(OTHER.loss, f.name)})
        assert told(replace(base, loss=changed)) != told(replace(base, loss=start)), f.name


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"std_ddof": 0}, "std_ddof"),
        ({"measure_kl": True}, "measure_kl"),
        ({"steps": 0}, "without steps"),
        ({"stratified": True}, "leave out stratified"),
        ({"credit": "step"}, "leave out credit"),
        ({"later_temperature": 1.3}, "leave out later_temperature"),
        ({"scale": "mean"}, "set scale to group"),
        (
            {"scale": "batch", "buffer_size": 96},
            "several rollouts (set scale to group, or questions_per_rollout to 16)",
        ),
        (
            {"scale": "batch", "buffer_size": 49},
            "several rollouts (set scale to group, or questions_per_rollout to 16)",
        ),
        ({"minibatch_size": 20}, "48 responses a step, 20 a minibatch"),
        ({"gradient_accumulation": 2}, "unequal size"),
        ({"loss": LossConfig(correction="token_truncate")}, "use_vllm=True"),
    ],
)
def test_what_trl_has_no_word_for(changes, word):
    with pytest.raises(ValueError, match="TRL has no word for") as error:
        trl_config(replace(GRPOConfig(), **changes))
    assert word in str(error.value) and str(error.value).count("\n") == 0


@pytest.mark.parametrize("settings", [
    {"buffer_size": 500, "minibatch_size": 16, "gradient_accumulation": 12},  # the article's
    {"minibatch_size": 20}, {"gradient_accumulation": 2}, {"questions_per_rollout": 5, "minibatch_size": 8},
])  # fmt: skip
def test_the_buffer_size_that_the_sentence_names_will_do(settings, tmp_path):
    config = replace(GRPOConfig(), **settings)
    with pytest.raises(ValueError, match="set buffer_size to") as error:
        trl_config(config)
    size = int(re.search("set buffer_size to ([0-9]+)", str(error.value))[1])
    assert trl_config(replace(config, buffer_size=size), output_dir=str(tmp_path)).generation_batch_size == size


@pytest.mark.parametrize("size", [96, 500])  # 500 is uneven too
def test_the_std_of_a_batch_is_trl_s_where_a_step_is_one_rollout(size, tmp_path):
    config = GRPOConfig(scale="batch", buffer_size=size)
    with pytest.raises(ValueError, match="the std over each of several rollouts") as error:
        trl_config(config)
    told = {
        key: int(number)
        for key, number in re.findall("(questions_per_rollout|buffer_size) to ([0-9]+)", str(error.value))
    }
    theirs = trl_config(replace(config, **told), output_dir=str(tmp_path))
    assert theirs.scale_rewards == "batch" and theirs.generation_batch_size == told["questions_per_rollout"] * 6 >= size


def test_all_that_trl_lacks_is_one_sentence():
    with pytest.raises(ValueError, match="population std .*, nor for a KL that is measured only"):
        trl_config(GRPOConfig(std_ddof=0, measure_kl=True))


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_vllm_server_and_correction(mode, tmp_path):
    config = GRPOConfig(loss=LossConfig(correction=mode, correction_cap=2.0))
    theirs = trl_config(config, output_dir=str(tmp_path), use_vllm=True, vllm_mode="server", vllm_server_port=8001)
    assert isinstance(theirs, TrlConfig) and theirs.use_vllm and theirs.vllm_mode == "server"
    assert theirs.vllm_importance_sampling_correction and theirs.vllm_importance_sampling_mode == mode
    assert theirs.vllm_importance_sampling_clip_max == 2.0 and theirs.vllm_server_port == 8001
    plain = trl_config(GRPOConfig(), output_dir=str(tmp_path), use_vllm=True)
    assert not plain.vllm_importance_sampling_correction  # ours is off, so TRL's is


def test_a_reference_that_would_not_be_the_policy(pocket, tmp_path):
    model, tokenizer = pocket
    task = load_task("letter_counting", size=4)
    config = GRPOConfig(loss=LossConfig(beta=0.1))
    with pytest.raises(ValueError, match="LoRA"):
        trl_trainer(model, tokenizer, task, config, output_dir=str(tmp_path))


@pytest.mark.parametrize("name", TASK_NAMES)
def test_trl_dataset_feeds_the_reward(name):
    task = load_task(name, size=5)
    data = trl_dataset(task)
    assert data.column_names == ["prompt", "example"] and len(data) == 5
    for row, example in zip(data, task, strict=True):
        assert row["prompt"] == messages(example.question) and Example(**row["example"]) == example
        texts = replies(task, example)
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        assert Reward(task)(chats, example=[row["example"]] * len(texts)) == Reward(task)(texts, example)


# --- TRL: real steps ---


def check(rows: list[dict], steps: int) -> None:
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert row["same_prompts"] and row["reward_difference"] < 1e-6 and row["advantage_difference"] < 1e-5, row
        assert row["our_loss"] == pytest.approx(row["their_loss"], abs=1e-5), row
        assert row["gradient_difference"] < 1e-5, row
        assert row["signal"] > 0.1 and row["grad_norm"] > 1e-3, row  # or there was nothing to compare


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_three_steps_of_trl_equal_ours(loss_type):
    check(compare_with_trl(3, LossConfig(loss_type, epsilon_high=5.0 if loss_type == "cispo" else 0.2)), 3)


def test_lora_with_kl_and_accumulation_equals_trl():
    rows = compare_with_trl(3, LossConfig("dapo", beta=0.1), lora_r=8, minibatch_size=16, gradient_accumulation=4)
    check(rows, 3)


def test_off_policy_updates_equal_trl():
    """Two passes over a buffer, two updates a pass: after the first the ratio is not 1, and some of it is clipped."""
    loss = LossConfig("dr_grpo", epsilon_low=0.02, epsilon_high=0.03)
    rows = compare_with_trl(4, loss, updates_per_buffer=2, minibatch_size=16, gradient_accumulation=2)
    assert rows[0]["clip_share"] == 0 and all(row["clip_share"] > 0.01 for row in rows[1:])
    check(rows, 4)


def test_tokens_of_a_mean_update():
    """A difference that `trl_config` names: TRL divides dapo's sum by the buffer's tokens / 2, not by this half's."""
    rows = compare_with_trl(2, "dapo", minibatch_size=16, gradient_accumulation=2)
    first, second = (row["their_loss"] / row["our_loss"] for row in rows)
    assert abs(first - 1) > 1e-4 and first + second == pytest.approx(2, abs=1e-5)  # t / (T / 2) each, 2 in all


def test_equal_rewards_that_round():
    """Another: TRL divides the rounding error of a mean by 1e-4, where we take equal rewards as equal."""
    even = torch.tensor([[0.0] * 8, [0.15] * 8, [0.85] * 8, [1.0] * 8])
    assert not group_advantages(even).any()
    most = abs(trl_advantages(even, "group")).max().item()  # 1.5e-4 here; how a mean is rounded is the CPU's affair
    for row in compare_with_trl(2, "dapo", weights=RewardConfig()):
        assert row["advantage_difference"] <= most + 1e-6 < 1e-3 and row["gradient_difference"] < 1e-3


def test_the_comparison_sees_a_wrong_update(monkeypatch):
    """The check can fail: a loss of another kind, or a temperature left out, shows."""
    right = Comparison.__init__

    def with_another_loss(self, trainer, tokenizer, reward, config):
        right(self, trainer, tokenizer, reward, replace(config, loss=LossConfig("grpo")))

    monkeypatch.setattr(Comparison, "__init__", with_another_loss)
    [row] = compare_with_trl(1, "dapo")
    assert row["gradient_difference"] > 1e-3


# --- verl ---


def load_as_verl_does():
    """`compute_score` from the file's path, as verl's `load_module` loads it: not entered in sys.modules."""
    spec = importlib.util.spec_from_file_location("custom_module_1", bridges.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compute_score


@pytest.mark.parametrize("name", TASK_NAMES)
def test_verl_rows_and_score(name, tmp_path):
    task = load_task(name, "test", size=4)
    path = write_verl(task, tmp_path)
    assert path == tmp_path / "test.parquet"
    data, score, reward = Dataset.from_parquet(str(path)), load_as_verl_does(), Reward(task)
    assert data.column_names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    for index, (row, example) in enumerate(zip(data, task, strict=True)):
        assert row["prompt"] == messages(example.question) and row["extra_info"]["index"] == index
        assert row["reward_model"] == {"style": "rule", "ground_truth": example.answer}
        # verl adds these two to extra_info before it scores
        extra = row["extra_info"] | {"num_turns": None, "rollout_reward_scores": {}}
        found = []
        for text in replies(task, example):
            got = score(
                data_source=row["data_source"], solution_str=text,
                ground_truth=row["reward_model"]["ground_truth"], extra_info=extra,
            )  # fmt: skip
            parts = reward.parts(text, example)
            assert got == {"score": parts["total"], "acc": parts["correct"], "format": parts["format"], "length": 0.0}
            found.append(got["score"])
        assert found[0] == 1.0 and found[1] == 0.15 and found[2] == 0.85  # right, wrong, right without thinking


def test_verl_reads_the_same_through_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    task = load_task("propositional_logic", size=3)
    for row, example in zip(pandas.read_parquet(write_verl(task, tmp_path)).to_dict("records"), task, strict=True):
        text = completion(task.thinking(example), example.answer)
        assert compute_score(row["data_source"], text, row["reward_model"]["ground_truth"], row["extra_info"])["acc"]


@pytest.mark.parametrize("text", [None, math.nan, b"<answer>3</answer>", 3, ["<answer>3</answer>"], torch.ones(2)])
def test_verl_completion_that_is_no_text(text):
    [row] = verl_rows(load_task("letter_counting", size=1))
    assert compute_score(row["data_source"], text, "3", row["extra_info"]) == dict.fromkeys(
        ("score", "acc", "format", "length"), 0.0
    )


@given(st.text(), st.sampled_from(TASK_NAMES), st.sampled_from([None, math.nan, b"3", 3, "3", ""]))
def test_verl_never_raises_on_a_completion(text, name, truth):
    [row] = verl_rows(load_task(name, size=1))
    assert 0 <= compute_score(name, text, truth, row["extra_info"], router=None)["score"] <= 1


def test_verl_weights_and_errors():
    [row] = verl_rows(load_task("letter_counting", size=1))
    text = completion("", row["reward_model"]["ground_truth"])
    args = (row["data_source"], text, row["reward_model"]["ground_truth"])
    weights = {"correct": 0.5, "format": 0.25, "length": 1.0, "length_target": 4}
    expected = Reward(load_task("letter_counting", size=1), RewardConfig(**weights))
    got = compute_score(*args, row["extra_info"], **weights)["score"]
    assert got == expected.parts(text, load_task("letter_counting", size=1)[0])["total"] != 1.0
    assert compute_score(*args, row["extra_info"], derivation=1.0)["derivation"] == 0.0
    for extra in (None, {}, {"metadata": None}, {"metadata": "{"}, math.nan):
        with pytest.raises(ValueError, match="write_verl"):
            compute_score(*args, extra)
    with pytest.raises(ValueError, match="no task 'gsm8k'"):
        compute_score("gsm8k", *args[1:], row["extra_info"])


# --- verifiers ---


@pytest.mark.parametrize("name", TASK_NAMES)
def test_chat_fields_hold_prompt_and_example(name):
    task = load_task(name, size=3)
    for row, example in zip(chat_fields(task), task, strict=True):
        roles = [{"role": "system", "content": row["system_prompt"]}, {"role": "user", "content": row["prompt"]}]
        assert roles == messages(example.question) and row["task"] == name
        assert Example(row["question"], row["answer"], row["metadata"]) == example


def test_the_taskset_has_every_weight_of_the_reward():
    """Read, not imported: `verifiers` is no dependency of ours."""
    [config] = [node for node in ast.parse((Path(bridges.__file__).parent / "taskset.py").read_text()).body
                if isinstance(node, ast.ClassDef) and node.name == "QuestionConfig"]  # fmt: skip
    theirs = [(line.target.id, line.annotation.id, ast.literal_eval(line.value)) for line in config.body
              if isinstance(line, ast.AnnAssign)]  # fmt: skip
    assert theirs == [(f.name, f.type.__name__, f.default) for f in fields(RewardConfig)]


@pytest.mark.parametrize("name", TASK_NAMES)
def test_taskset_scores_as_our_reward(name, tmp_path, monkeypatch):
    vf = pytest.importorskip("verifiers.v1", reason="prime-rl's package is no dependency of ours")
    loaders = pytest.importorskip("verifiers.v1.utils.loaders")
    (tmp_path / "questions_v1.py").write_text('from helpers.taskset import Questions\n__all__ = ["Questions"]\n')
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"id": "questions-v1", "questions": name, "split": "test", "size": 3}
    settings["task"] = {"length_target": 9, "derivation": 0.5}
    config = loaders.resolve_env_config({"taskset": settings}).taskset
    taskset = vf.load_taskset(config)
    reward = Reward(load_task(name, "test", 3), RewardConfig(length_target=9, derivation=0.5))
    for question, example in zip(taskset, reward.task, strict=True):
        assert question.data.prompt == example.question and question.data.system_prompt
        for text in replies(reward.task, example)[:-1]:  # the last is no Unicode, which no server sends
            trace = vf.Trace(
                task=vf.TraceTask(type="Question", data=question.data), agent=vf.AgentInfo(config=vf.AgentConfig()),
                root_reply=text,
            )  # fmt: skip
            asyncio.run(question.score(trace))
            parts = reward.parts(text, example)
            assert trace.reward == parts.pop("total") and trace.metrics == parts


def test_the_reward_needs_no_torch():
    """verl's reward workers and prime-rl's environments load it in processes of their own, by the dozen."""
    code = "import sys, helpers.bridges; print(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
