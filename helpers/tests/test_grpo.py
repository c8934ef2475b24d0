"""The loop against plain computations: its gradient, its old log-probs, its reference, its figures, its learning."""

import copy
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import grpo as module
from helpers.buffer import Buffer, Experience
from helpers.decoder import Decoder
from helpers.grpo import Collected, GRPOConfig, by_step, check_fits, grpo, learn, questions_of, score, summarise
from helpers.losses import LossConfig, policy_loss
from helpers.models import add_lora, bare
from helpers.pocket import pocket_tokenizer
from helpers.prompts import completion
from helpers.rewards import Reward, RewardConfig
from helpers.rollout import Response
from helpers.runs import Run, trained_weights
from helpers.tasks import Example, Task, load_task
from helpers.tests.conftest import no_decoder

torch.set_num_threads(1)
TOKENIZER = pocket_tokenizer()
LENGTHS, ADVANTAGES = (3, 7, 1, 5, 4, 6, 2, 5), (1.0, -0.7, 0.0, 0.4, -1.2, 0.0, 0.9, -0.3)


@pytest.fixture(autouse=True)
def one_accelerator_a_test():
    """accelerate keeps the first accelerator's settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny_model(seed=0):
    """A Llama of 20,000 parameters."""
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
        eos_token_id=TOKENIZER.eos_token_id, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


class StartsEarly(Task):
    """A made-up task: "say words", where a word is right that begins with a to m."""

    name = "starts_early"

    @classmethod
    def draw(cls, split, size, seed, balanced):
        return cls([Example(f"How many {c} ?", "Yes") for c in "abcdefghijkl"[:size]], split, ())

    key = staticmethod(str)
    thinking = check_thinking = None

    def score(self, answer, example):
        words = answer.split()
        return sum("a" <= word[0] <= "m" for word in words) / max(1, len(words))


class WholeText(Reward):
    """A reward on all of the completion, as an untrained model writes no tags."""

    def parts(self, completion, example):
        right = self.task.score(completion, example)
        return {"correct": float(right == 1.0), "format": 0.0, "length": 0.0, "total": right}


TASK = StartsEarly.draw("train", 12, 0, True)
SMALL = GRPOConfig(
    steps=3, questions_per_rollout=2, group_size=4, buffer_size=8, minibatch_size=8, gradient_accumulation=1,
    learning_rate=1e-3, temperature=0.8, top_p=1.0, max_new_tokens=6,
)  # fmt: skip


def train(model, config=SMALL, **more):
    return grpo(model, TOKENIZER, TASK, config, reward=WholeText(TASK), progress=False, **more)


def test_from_some_step_on_a_run_is_one_of_another_temperature(tmp_path):
    """As if it had been stopped there and gone on with that temperature; not before, and not in part."""
    # With old and reference log-probs of their own, which must be at the step's temperature as well.
    config = replace(SMALL, steps=4, updates_per_buffer=2, measure_kl=True)
    whole = tiny_model()
    history = train(whole, replace(config, later_temperature=1.3, later_after=2))
    parts, run = tiny_model(), Run(tmp_path)
    stopped = train(tiny_model(), replace(config, steps=2, checkpoint_every=2), run=run)
    went_on = train(parts, replace(config, temperature=1.3), run=run)
    same = FIELDS - {"tokens_per_second", "seconds_sampling", "seconds_learning"} | {"kl"}
    for mine, theirs in zip(history, [*stopped, *went_on], strict=True):
        assert {k: mine[k] for k in same} == {k: theirs[k] for k in same}
    assert all(map(torch.equal, whole.parameters(), parts.parameters()))
    as_before = tiny_model()
    train(as_before, config)
    assert not all(map(torch.equal, whole.parameters(), as_before.parameters()))


# --- the update, against a plain computation ---


class Recorder(Accelerator):
    """Keeps the gradients of each update, as they are before they are clipped."""

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        self.gradients = [*getattr(self, "gradients", []), gradients]
        return super().clip_grad_norm_(parameters, max_norm, norm_type)


def experiences(model, spread=0.3, temperature=0.8):
    """Random rows of unequal lengths; old and reference log-probs are the model's, moved by up to `spread`."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, (length, advantage) in enumerate(zip(LENGTHS, ADVANTAGES, strict=True)):
        ids = torch.randint(5, len(TOKENIZER), (4 + number % 3 + length,), generator=generator).tolist()
        row = Experience(ids[:-length], ids[-length:], advantage)
        with torch.no_grad():
            logprobs = plain_logprobs(model, row, temperature)[0]
        old, ref = (logprobs + spread * (2 * torch.rand(2, length, generator=generator) - 1)).unbind()
        rows.append(replace(row, old_logprobs=old, reference_logprobs=ref))
    return rows


def plain_logprobs(model, row, temperature):
    """One row through the whole model: (T,) log-probs and (T,) entropies of the response."""
    logits = model(input_ids=torch.tensor([row.prompt_ids + row.response_ids])).logits[0] / temperature
    table = logits.log_softmax(-1)[len(row.prompt_ids) - 1 : -1]
    return table.gather(1, torch.tensor(row.response_ids)[:, None])[:, 0], -(table.exp() * table).sum(-1)


def plain_loss(model, rows, loss, temperature=0.8, max_length=9):
    """The loss over all rows, each alone, no padding, no accumulation, written down from the papers."""
    per_row, entropies = [], []
    for row in rows:
        new, entropy = plain_logprobs(model, row, temperature)
        ratio = (new - row.old_logprobs).exp()
        if loss.importance == "sequence":
            ratio = (new - row.old_logprobs).mean().exp().expand(len(new))
        if loss.loss_type == "cispo":
            token_loss = -ratio.detach().clamp(max=loss.epsilon_high) * row.advantage * new
        else:
            clipped = ratio.clamp(1 - loss.epsilon_low, 1 + loss.epsilon_high)
            token_loss = -torch.minimum(ratio * row.advantage, clipped * row.advantage)
        d = row.reference_logprobs - new
        per_row.append(token_loss + loss.beta * (d.exp() - d - 1))
        entropies.append(entropy)
    tokens = sum(map(len, per_row))
    total = {
        "grpo": sum(r.mean() for r in per_row) / len(rows),
        "dr_grpo": sum(r.sum() for r in per_row) / (len(rows) * max_length),
    }.get(loss.loss_type, sum(r.sum() for r in per_row) / tokens)
    return total - loss.entropy_coefficient * torch.cat(entropies).mean()


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return gradients


def learned(model, rows, config, **more):
    """(figures, gradients of each update) of `learn` on a copy of the model."""
    model, accelerator = copy.deepcopy(model), Recorder(cpu=True)
    buffer = Buffer(len(rows))
    buffer.add(rows)
    stats = learn(model, torch.optim.SGD(model.parameters(), lr=1e-3), buffer, config, accelerator, **more)
    return stats, accelerator.gradients


def assert_same(mine, right):
    largest = max(g.abs().max().item() for g in right)
    assert largest > 1e-3
    for a, b in zip(mine, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)


LOSSES = {
    **{name: LossConfig(loss_type=name) for name in ("grpo", "bnpo", "dr_grpo", "dapo")},
    "cispo": LossConfig(loss_type="cispo", epsilon_high=1.1),
    "gspo": LossConfig(importance="sequence", epsilon_low=0.05, epsilon_high=0.05),
    "kl": LossConfig(beta=0.3),
    "kl, dapo": LossConfig(loss_type="dapo", beta=0.3, epsilon_high=0.28),
    "entropy": LossConfig(loss_type="dr_grpo", entropy_coefficient=0.2),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("minibatch_size", "gradient_accumulation"), [(8, 1), (3, 3), (1, 8)])
def test_one_update_has_the_gradient_of_the_plain_loss_over_all_rows(name, minibatch_size, gradient_accumulation):
    loss, model = LOSSES[name], tiny_model()
    rows = experiences(model)
    plain = plain_loss(model, rows, loss)
    right = gradient_of(model, plain)
    if name == "bnpo":  # a mean over minibatches, each over its own tokens; a group stays together
        ordered = sorted(rows, key=lambda e: (e.prompt_ids, len(e)))
        minis = [ordered[i : i + minibatch_size] for i in range(0, 8, minibatch_size)]
        plain = sum(plain_loss(model, mini, loss) for mini in minis) / len(minis)
        right = gradient_of(model, plain)
    config = replace(SMALL, minibatch_size=minibatch_size, gradient_accumulation=gradient_accumulation,
                     loss=loss, max_new_tokens=9)  # fmt: skip
    for seed in (0, 1):  # the order of the rows does not matter
        stats, [gradients] = learned(model, rows, config, seed=seed)
        assert_same(gradients, right)
        assert stats["loss"] == pytest.approx(plain.item(), rel=1e-4, abs=1e-6)
        norm = torch.stack([g.norm() for g in right]).norm().item()
        assert stats["grad_norm"] == pytest.approx(norm, rel=1e-4)
        if name not in ("kl", "kl, dapo", "entropy"):
            assert 0 < stats["clip_share"] < 1


def test_rows_without_signal_are_left_out_of_the_forward_pass_but_not_of_the_counts(monkeypatch):
    model = tiny_model()
    rows, seen, collate = experiences(model), [], module.collate
    monkeypatch.setattr(module, "collate", lambda batch: seen.extend(batch) or collate(batch))
    for config, expected in [
        (SMALL, 6), (replace(SMALL, measure_kl=True), 8), (replace(SMALL, loss=LossConfig(beta=0.1)), 8),
    ]:  # fmt: skip
        seen.clear()
        learned(model, rows, config)
        assert len(seen) == expected


@pytest.mark.parametrize("measure_kl", [False, True], ids=["left out", "computed"])
def test_an_update_without_any_signal_is_one_with_a_gradient_of_0(measure_kl):
    """It moves nothing of itself, but an optimiser's momentum goes on, whether or not the rows were computed."""
    config = replace(SMALL, measure_kl=measure_kl, max_grad_norm=1e9)
    model = tiny_model()
    rows, optimizer = experiences(model), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    at = [copy.deepcopy(model)]
    for signal in (False, True, False):
        buffer = Buffer(8)
        buffer.add(rows if signal else [replace(e, advantage=0.0) for e in rows])
        stats = learn(model, optimizer, buffer, config, Accelerator(cpu=True))
        at.append(copy.deepcopy(model))
        for name in ("loss", "grad_norm", "clip_share", "clip_share_low", "clip_share_high"):
            assert signal or abs(stats[name]) < 1e-6
    for start, still, moved, further in zip(*(m.parameters() for m in at), strict=True):
        torch.testing.assert_close(start, still, rtol=0, atol=1e-6)
        torch.testing.assert_close(further - moved, 0.9 * (moved - still), rtol=1e-3, atol=1e-6)
    assert not torch.equal(at[2].lm_head.weight, at[1].lm_head.weight)


def test_several_updates_a_buffer_are_as_many_as_they_should_be():
    model = tiny_model()
    rows = experiences(model)
    for minibatch_size, accumulation, updates_per_buffer, updates in [(2, 2, 1, 2), (3, 1, 2, 6), (3, 2, 1, 2)]:
        config = replace(SMALL, minibatch_size=minibatch_size, gradient_accumulation=accumulation,
                         updates_per_buffer=updates_per_buffer)  # fmt: skip
        assert len(learned(model, rows, config)[1]) == updates


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient(lora):
    """And it is on: each layer runs once more for the backward pass."""
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model()
        rows = experiences(model)
        model = add_lora(model, r=4, alpha=8) if lora else model
        if lora:  # B matrices begin at 0, which would leave the A matrices without a gradient
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_B" in name:
                        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        if checkpointing:
            bare(model).activation_checkpointing_enable()
        model.train()
        counter = Counter()
        layer = bare(model).model.layers[1].mlp
        layer.register_forward_pre_hook(lambda *_, counter=counter: counter.update(["calls"]))
        buffer = Buffer(8)
        buffer.add(rows)
        accelerator = Recorder(cpu=True)
        weights = [p for p in model.parameters() if p.requires_grad]
        learn(model, torch.optim.SGD(weights, lr=0.0), buffer, SMALL, accelerator)
        gradients.append(accelerator.gradients[0])
        calls.append(counter["calls"])
    assert_same(gradients[1], gradients[0])
    assert calls == [1, 2]


def test_the_loop_switches_gradient_checkpointing_on():
    model = tiny_model()
    train(model, replace(SMALL, steps=1, gradient_checkpointing=True))
    assert model.is_activation_checkpointing


# --- old and reference log-probs ---


@pytest.fixture
def losses(monkeypatch):
    """What each call of the loss is given, in order: (new, old, mask)."""
    given_to, policy_loss = [], module.policy_loss

    def keep(new, old, advantages, mask, *rest, **more):
        given_to.append((new.detach().clone(), old.clone(), mask))
        return policy_loss(new, old, advantages, mask, *rest, **more)

    monkeypatch.setattr(module, "policy_loss", keep)
    return given_to


def difference(call):
    new, old, mask = call
    return (new - old)[mask].abs().max().item()


def test_on_policy_the_ratio_is_exactly_1(losses):
    history = train(tiny_model())
    assert len(losses) == 3 and all(difference(call) == 0 for call in losses)
    assert all(r["ratio_min"] == r["ratio_max"] == 1 and r["clip_share"] == 0 for r in history)


@pytest.mark.parametrize("several", [{"updates_per_buffer": 3}, {"minibatch_size": 3, "updates_per_buffer": 1}])
def test_old_logprobs_are_those_before_the_first_update_of_a_buffer(losses, several):
    """Each buffer: the first update sees ratio 1, the later ones the same old log-probs and a ratio that is off."""
    history = train(tiny_model(), replace(SMALL, scale="none", learning_rate=1e-2, measure_kl=True, **several))
    a_step = len(losses) // 3
    assert a_step == 3
    for at in range(0, len(losses), a_step):
        first, *later = losses[at : at + a_step]
        assert difference(first) < 1e-5
        assert all(difference(call) > 1e-3 for call in later)
        if "minibatch_size" not in several:  # the same rows each time, though in another order
            assert all(
                sorted(call[1].sum(1).tolist()) == pytest.approx(sorted(first[1].sum(1).tolist())) for call in later
            )
    assert all(r["ratio_max"] > 1 for r in history)


def test_scores_are_the_plain_ones_in_the_order_given():
    model = tiny_model()
    rows = experiences(model)
    for minibatch_size in (1, 3, 8):
        scores = score(model, rows, replace(SMALL, minibatch_size=minibatch_size), Accelerator(cpu=True))
        for row, mine in zip(rows, scores, strict=True):
            torch.testing.assert_close(mine, plain_logprobs(model, row, 0.8)[0], rtol=0, atol=1e-5)
            assert not mine.requires_grad


@pytest.mark.parametrize("lora", [False, True])
def test_the_kl_is_to_the_starting_policy_which_does_not_stay(monkeypatch, lora):
    model = add_lora(tiny_model(), r=4, alpha=8) if lora else tiny_model()
    sampled_with, trained_from, references = [], [], []

    def weights():
        return {name: tensor.clone() for name, tensor in trained_weights(model).items()}

    collect, learn = module.collect, module.learn

    def spy_on_collect(*args):
        sampled_with.append(weights())
        return collect(*args)

    def spy_on_learn(policy, optimizer, buffer, *args, **more):
        trained_from.append(weights())
        references.append(buffer.experiences)
        return learn(policy, optimizer, buffer, *args, **more)

    monkeypatch.setattr(module, "collect", spy_on_collect)
    monkeypatch.setattr(module, "learn", spy_on_learn)
    start = copy.deepcopy(model)
    history = train(model, replace(SMALL, learning_rate=1e-2, loss=LossConfig(beta=0.1)))
    assert abs(history[0]["kl"]) < 1e-6
    assert all(r["kl"] > 1e-4 for r in history[1:])
    for before, after in zip(sampled_with, trained_from, strict=True):  # put back to the last bit
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(sampled_with[0][name], sampled_with[2][name]) for name in sampled_with[0])
    for row in references[2]:  # the third step's references are those of the policy before the first
        right = plain_logprobs(start, row, SMALL.temperature)[0].detach()
        torch.testing.assert_close(row.reference_logprobs, right, rtol=0, atol=1e-5)


def test_measuring_the_kl_changes_nothing_else():
    models = tiny_model(), tiny_model()
    plain, measured = (train(m, replace(SMALL, measure_kl=on)) for m, on in zip(models, (False, True), strict=True))
    assert [r["reward"] for r in plain] == [r["reward"] for r in measured]
    assert "kl" not in plain[0] and measured[2]["kl"] > measured[0]["kl"] == pytest.approx(0, abs=1e-6)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# --- which questions ---


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_questions_cover_the_task_before_they_repeat(size, count, seed, stratified):
    task = StartsEarly.draw("train", size, 0, True)
    rollouts = -(-2 * size // count)
    drawn = [e.question for number in range(rollouts) for e in questions_of(task, number, count, seed, stratified)]
    everything = sorted(e.question for e in task)
    assert sorted(drawn[:size]) == sorted(drawn[size : 2 * size]) == everything


def test_questions_come_in_another_order_each_time_and_for_each_seed():
    orders = [tuple(e.question for e in questions_of(TASK, n, 12, seed)) for seed in (0, 1) for n in range(3)]
    assert len(set(orders)) == 6
    assert orders[0] == tuple(e.question for e in questions_of(TASK, 0, 12, 0))


@pytest.mark.parametrize("name, classes", [("syllogism", 2), ("letter_counting", 3)])
def test_a_stratified_step_asks_for_each_answer_equally_often(name, classes):
    task, plain, first = load_task(name, size=120), [], set()
    for number in range(120 // 12):
        drawn = [e.answer for e in questions_of(task, number, 12, 5, stratified=True)]
        assert set(Counter(drawn).values()) == {12 // classes} and len(set(drawn)) == classes
        first.add(drawn[0])  # the question whose responses a run keeps as samples
        plain.append(len(set(Counter(e.answer for e in questions_of(task, number, 12, 5)).values())) == 1)
    assert not all(plain) and len(first) == classes


def test_a_task_without_given_steps_has_no_advantage_a_step():
    with pytest.raises(
        ValueError, match="propositional_logic's derivations have no given steps: leave out grpo.credit"
    ):
        check_fits(replace(SMALL, credit="step"), load_task("propositional_logic", size=2))
    check_fits(replace(SMALL, credit="step"), load_task("letter_counting", size=2))


def test_each_token_has_the_advantage_of_its_step():
    task = load_task("letter_counting", "train", 30, seed=4)
    example = next(e for e in task if len(e.metadata["word"]) > 5)
    right = completion(task.thinking(example), example.answer)
    third = [m.start() for m in re.finditer("=", right)][2]
    slip = right[:third] + "= 8" + right[third + 3 :]  # the third letter's count
    texts = [right, slip, right.replace(f"<answer> {example.answer}", "<answer> 9"), right]
    ids = [TOKENIZER.encode(text, add_special_tokens=False) + [TOKENIZER.eos_token_id] for text in texts]
    group = [Response(row, [0.0] * len(row), True) for row in ids]
    rows = by_step(group, texts, example, Reward(task), TOKENIZER, replace(SMALL, scale="none", credit="step"))
    at_third, at_answer = [1 / 4, -3 / 4, 1 / 4, 1 / 4], [1 / 3, None, -2 / 3, 1 / 3]
    for response, text, row, a, b in zip(group, texts, rows, at_third, at_answer, strict=True):
        tokens = [TOKENIZER.decode([token]) for token in response.token_ids]
        assert row.shape == (len(tokens),)
        step, answer = (
            [t for t, x in zip(tokens, row.tolist(), strict=True) if x and x == pytest.approx(v)] for v in (a, b)
        )
        assert step == text[: third + 3].split()[-3:]
        assert b is None or answer[0] == "</think>" and answer[-1] == tokens[-1]
        assert sum(x != 0 for x in row.tolist()) == len(step) + len(answer)  # 0 where all are right, and after a slip


def test_one_advantage_at_every_token_of_a_response_is_the_response_s():
    model = tiny_model()
    rows = experiences(model)
    config = replace(SMALL, minibatch_size=3, gradient_accumulation=3)
    by_token = [replace(e, token_advantages=torch.full((len(e.response_ids),), e.advantage)) for e in rows]
    (_, [mine]), (_, [right]) = learned(model, by_token, config), learned(model, rows, config)
    assert_same(mine, right)


def test_the_loop_learns_by_the_step(monkeypatch):
    task, seen = load_task("letter_counting", "train", 4), []

    def written(sampler, prompts, group_size, **more):  # the teacher's words, and in the first group two slips
        groups = []
        for number, example in enumerate(questions_of(task, 0, len(prompts), 0)):
            right = completion(task.thinking(example), example.answer)
            wrong = right.replace("=", "= 9", 1)
            texts = [wrong, wrong, right, right] if number == 0 else [right] * 4
            ids = [TOKENIZER.encode(text, add_special_tokens=False) for text in texts]
            groups.append([Response(row, [-1.0] * len(row), True) for row in ids])
        return groups

    def loss(new, old, advantages, *args, **more):
        seen.append(advantages)
        return policy_loss(new, old, advantages, *args, **more)

    monkeypatch.setattr(module, "rollout", written)
    monkeypatch.setattr(module, "policy_loss", loss)
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    [record] = grpo(model, TOKENIZER, task, replace(SMALL, credit="step", steps=1), progress=False)
    [advantages] = seen
    assert advantages.dim() == 2 and len(advantages) == 4  # the group without a slip is left out
    assert sorted(row[0].item() > 0 for row in advantages) == [False, False, True, True]
    assert record["no_signal"] == 0.5 and record["grad_norm"] > 0
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_task_without_a_list_of_answers_cannot_be_stratified():
    task = load_task("propositional_logic", size=4)
    with pytest.raises(ValueError, match="leave out grpo.stratified"):
        grpo(tiny_model(), TOKENIZER, task, replace(SMALL, stratified=True), progress=False)


@pytest.mark.parametrize("name", ["syllogism", "letter_counting"])
def test_answers_that_are_not_equally_frequent_cannot_be_stratified(name):
    task = load_task(name, size=60, balanced=False)
    with pytest.raises(ValueError, match=f"^{name}'s answers are not equally frequent: set balanced, or leave out "):
        check_fits(replace(SMALL, stratified=True), task)
    check_fits(SMALL, task)
    check_fits(replace(SMALL, stratified=True), load_task(name, size=61))


def test_with_credit_by_the_step_a_reward_below_0_does_no_harm():
    task = load_task("letter_counting", size=4)
    reward = Reward(task, RewardConfig(correct=0.0, format=0.0, length=1.0, length_target=1))
    settings = replace(SMALL, steps=1, credit="step", scale="mean")
    [record] = grpo(tiny_model(), TOKENIZER, task, settings, reward=reward, progress=False)
    assert record["reward"] < 0


def test_the_loop_fills_the_buffer_with_rollouts_that_do_not_repeat(monkeypatch):
    drawn, sizes, collect, learn = [], [], module.collect, module.learn

    def spy_on_collect(*args):
        drawn.append(collect(*args))
        return drawn[-1]

    def spy_on_learn(policy, optimizer, buffer, *rest, **more):
        sizes.append(len(buffer))
        return learn(policy, optimizer, buffer, *rest, **more)

    monkeypatch.setattr(module, "collect", spy_on_collect)
    monkeypatch.setattr(module, "learn", spy_on_learn)
    history = train(tiny_model(), replace(SMALL, steps=2, group_size=2, buffer_size=9))
    assert sizes == [12, 12]  # three rollouts of 2 x 2 a step: a group is never torn
    questions = [e.question for c in drawn for e in c.examples]
    assert len(drawn) == 6 and len(set(questions)) == 12
    assert len({str(c.responses) for c in drawn}) == 6
    assert history[0]["length"] == pytest.approx(
        sum(len(r.token_ids) for c in drawn[:3] for g in c.responses for r in g) / 12
    )


# --- figures ---

FIELDS = {
    "stage", "step", "reward", "reward_std", "accuracy", "format_rate", "no_signal", "length", "unfinished",
    "entropy", "loss", "grad_norm", "clip_share", "clip_share_low", "clip_share_high", "tokens_per_second",
    "seconds_sampling", "seconds_learning",
}  # fmt: skip


def test_every_step_has_every_figure_with_signal_or_without():
    class Same(WholeText):
        def parts(self, completion, example):
            return {"correct": 1.0, "format": 1.0, "length": 0.0, "total": 1.0}

    seen = []
    config = replace(SMALL, measure_kl=True)
    history = grpo(tiny_model(), TOKENIZER, TASK, config, reward=Same(TASK), progress=False, on_step=seen.append)
    assert seen == history and [r["step"] for r in history] == [1, 2, 3]
    for record in history:
        assert FIELDS | {"kl"} <= record.keys()
        assert (record["reward"], record["reward_std"], record["no_signal"]) == (1.0, 0.0, 1.0)
        assert record["grad_norm"] == pytest.approx(0, abs=1e-6) and abs(record["kl"]) < 1e-6
    for record in train(tiny_model()):
        assert FIELDS <= record.keys() and record["no_signal"] < 1 and record["grad_norm"] > 0
    without = grpo(tiny_model(), TOKENIZER, TASK, SMALL, reward=Same(TASK), progress=False)
    assert all(FIELDS <= record.keys() for record in without)


def test_a_summary_checked_by_hand():
    def response(n, finished):
        return Response(list(range(n)), [-0.5] * n, finished)

    rewards = torch.tensor([[1.0, 0.0], [0.15, 0.15]])
    parts = [[{"correct": 1.0, "format": 1.0}, {"correct": 0.0, "format": 0.0}],
             [{"correct": 0.0, "format": 1.0}, {"correct": 0.0, "format": 1.0}]]  # fmt: skip
    responses = [[response(2, True), response(4, False)], [response(3, True), response(3, True)]]
    made = [Experience([1], [2], advantage) for advantage in (0.7, -0.7, 0.0, 0.0)]
    summary = summarise([Collected([], responses, [], parts, rewards, made)])
    assert summary == pytest.approx({
        "reward": 0.325, "reward_std": rewards.std().item(), "accuracy": 0.25, "format_rate": 0.75,
        "no_signal": 0.5, "length": 3.0, "unfinished": 0.25, "entropy": 0.5,
    })  # fmt: skip
    sound = [[{**part, "derivation": part["correct"], "steps": 0.5} for part in group] for group in parts]
    summary = summarise([Collected([], responses, [], sound, rewards, made)])
    assert (summary["derivation_rate"], summary["steps_rate"]) == (0.25, 0.5)


def test_the_entropy_is_that_of_the_sampling_distribution():
    """Estimated from the tokens that were drawn, so near the mean of the exact one over many of them."""
    model = tiny_model()
    config = replace(SMALL, steps=1, group_size=64, buffer_size=128, minibatch_size=128, learning_rate=1e-9)
    exact = replace(config, loss=LossConfig(entropy_coefficient=1e-9))
    collected = []
    [plain] = train(model, config, on_step=collected.append)
    [record] = train(tiny_model(), exact)
    assert plain["entropy"] == pytest.approx(record["entropy"], rel=0.05)
    assert plain["entropy"] != record["entropy"]


# --- learning ---


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, learning_rate=1e-2),
        replace(SMALL, learning_rate=1e-2, top_p=0.9, updates_per_buffer=2, loss=LossConfig("dapo", epsilon_high=0.28)),
        replace(SMALL, learning_rate=1e-2, scale="none", loss=LossConfig("dr_grpo", beta=0.01)),
    ],
    ids=["grpo", "dapo, two updates", "dr_grpo, kl"],
)
def test_the_reward_rises_on_an_easy_task(config):
    config = replace(config, steps=30, group_size=8, buffer_size=16, minibatch_size=16)
    rewards = [r["reward"] for r in train(tiny_model(), config)]
    assert sum(rewards[-3:]) / 3 > 0.8 > 0.6 > sum(rewards[:3]) / 3


@pytest.mark.parametrize("by", ["a decoder", "the model"])
def test_lora_learns_too_and_what_samples_is_the_policy_merged(monkeypatch, by):
    """In float32 the copy's log-probs are the trainer's at every step; only the adapter changes."""
    if by == "the model":
        no_decoder(monkeypatch)
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    policy = add_lora(model, r=4, alpha=16)
    gaps, collect = [], module.collect

    def compare(sampler, *args):
        assert isinstance(sampler, Decoder) if by == "a decoder" else sampler is model
        found = collect(sampler, *args)
        scores = score(policy, found.experiences, config, Accelerator(cpu=True))
        theirs = [torch.tensor(r.logprobs) for group in found.responses for r in group]
        gaps.append(max((a - b).abs().max().item() for a, b in zip(scores, theirs, strict=True)))
        return found

    monkeypatch.setattr(module, "collect", compare)
    config = replace(SMALL, steps=30, group_size=8, buffer_size=16, minibatch_size=16, learning_rate=2e-2)
    rewards = [r["reward"] for r in train(policy, config, sampler_dtype=torch.float32)]
    assert sum(rewards[-3:]) / 3 > 0.8 > 0.6 > sum(rewards[:3]) / 3
    assert max(gaps) < 1e-4
    after = {name.replace(".base_layer", ""): tensor for name, tensor in bare(policy).state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_bfloat16_copy_samples_from_the_policy_of_each_step(monkeypatch):
    policy, refreshed, refresh = add_lora(tiny_model(), r=4, alpha=16), [], Decoder.refresh
    monkeypatch.setattr(Decoder, "refresh", lambda self, p: refreshed.append(self.dtype) or refresh(self, p))
    config = replace(SMALL, steps=30, group_size=8, buffer_size=16, minibatch_size=16, learning_rate=2e-2)
    rewards = [r["reward"] for r in train(policy, config, sampler_dtype=torch.bfloat16)]
    assert sum(rewards[-3:]) / 3 > 0.8 > 0.6 > sum(rewards[:3]) / 3
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert refreshed == [torch.bfloat16] * 31  # when it was made, and before each step


def test_the_same_seed_gives_the_same_run_and_another_another():
    runs = [[(r["reward"], r["loss"]) for r in train(tiny_model(), seed=seed)] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert all(a != b for a, b in pairwise(runs[0]))


# --- settings ---


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        *(({name: 0}, rf"^grpo\.{name} must be 1 or more, not 0\.$") for name in (
            "questions_per_rollout", "buffer_size", "updates_per_buffer", "minibatch_size",
            "gradient_accumulation", "max_new_tokens", "checkpoint_every",
        )),
        ({"steps": -1}, r"^grpo\.steps must be 0 or more, not -1\.$"),
        ({"group_size": 1}, r"^grpo\.group_size must be 2 or more: one response has no group, not 1\.$"),
        ({"later_temperature": 0.0}, r"^grpo\.later_temperature must be above 0, or null, not 0\.0\.$"),
        ({"later_after": -1}, r"^grpo\.later_after must be 0 or more, not -1\.$"),
        ({"temperature": 0.0}, "temperature, learning_rate and max_grad_norm above 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_p": 1.1}, "0 < top_p <= 1"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm"),
        ({"scale": "groups"}, r"^scale must be one of group, batch, none, mean, not 'groups'\.$"),
        ({"std_ddof": 2}, "^std_ddof must be 0"),
        ({"credit": "steps"}, r"^There is no grpo\.credit 'steps'; did you mean 'step'\?$"),
        ({"credit": "step", "scale": "batch"}, r"^grpo\.credit=step needs a scale of group, none or mean"),
        ({"credit": "step", "loss": LossConfig(importance="sequence")}, "and an importance of token"),
    ],
)  # fmt: skip
def test_wrong_settings_get_one_sentence(setting, message):
    with pytest.raises(ValueError, match=message) as refusal:
        GRPOConfig(**setting)
    assert "\n" not in str(refusal.value)
