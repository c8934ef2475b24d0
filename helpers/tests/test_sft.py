"""The warm-up: its loss and gradient against transformers' own, what is left out, the learning rate, the order."""

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import sft as module
from helpers.models import load_model
from helpers.prompts import completion, messages
from helpers.sft import SFTConfig, encode_traces, sft
from helpers.tasks import load_task

torch.set_num_threads(1)
TASK = load_task("letter_counting", "train", 6)


@pytest.fixture
def pocket():
    return load_model("pocket", device="cpu")


class Recorder(Accelerator):
    """Keeps the gradients of each update, as they are before they are clipped."""

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        self.gradients = [*getattr(self, "gradients", []), [p.grad.clone() for p in parameters]]
        return super().clip_grad_norm_(parameters, max_norm, norm_type)


def transformers_loss(model, tokenizer, task):
    """The loss transformers computes: whole chats from the template, -100 on the prompts and the padding."""
    chats, labels = [], []
    for example in task:
        asked = messages(example.question)
        told = {"role": "assistant", "content": completion(task.thinking(example), example.answer)}
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        chat = tokenizer.apply_chat_template([*asked, told], return_dict=False)
        assert chat[: len(prompt)] == prompt and chat[-1] == tokenizer.eos_token_id
        chats.append(torch.tensor(chat))
        labels.append(torch.tensor([-100] * len(prompt) + chat[len(prompt) :]))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(chats, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad([torch.ones_like(c) for c in chats], batch_first=True)
    return model(input_ids=ids, attention_mask=mask, labels=pad(labels, batch_first=True, padding_value=-100)).loss


@pytest.mark.parametrize("minibatch_size", [1, 4, 6, 100])
def test_loss_and_gradient_are_transformers_own_whatever_the_minibatch(pocket, minibatch_size):
    model, tokenizer = pocket
    loss = transformers_loss(model, tokenizer, TASK)
    loss.backward()
    right = [p.grad.clone() for p in model.parameters()]
    norm = torch.stack([g.norm() for g in right]).norm().item()
    model.zero_grad()
    config = SFTConfig(traces=6, epochs=1, batch_size=6, minibatch_size=minibatch_size)
    accelerator = Recorder(cpu=True)
    [record] = sft(model, tokenizer, TASK, config, accelerator=accelerator, progress=False)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)
    [gradients] = accelerator.gradients
    for mine, theirs in zip(gradients, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_the_loss_falls_and_the_model_is_left_ready_to_answer(pocket):
    model, tokenizer = pocket
    config = SFTConfig(epochs=5, batch_size=3, learning_rate=1e-3)
    history = sft(model, tokenizer, TASK, config, progress=False)
    assert [r["step"] for r in history] == list(range(1, 11)) and {r["stage"] for r in history} == {"sft"}
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert not model.training
    assert transformers_loss(model, tokenizer, TASK).item() < history[-1]["loss"]


def test_only_traces_that_the_verifier_accepts_are_learned(pocket):
    _, tokenizer = pocket
    traces = [(TASK.thinking(example), example.answer) for example in TASK]
    assert len(encode_traces(tokenizer, TASK, traces)) == 6
    traces[1] = (traces[1][0], "7")  # a wrong answer
    traces[2] = (f"{traces[2][0]} </think> more", traces[2][1])  # a tag inside the thinking
    traces[4] = (traces[4][0], "")
    kept = encode_traces(tokenizer, TASK, traces)
    assert [e.prompt_ids for e in kept] == [
        tokenizer.apply_chat_template(messages(TASK[i].question), add_generation_prompt=True, return_dict=False)
        for i in (0, 3, 5)
    ]
    for i, experience in zip((0, 3, 5), kept, strict=True):
        assert experience.response_ids[-1] == tokenizer.eos_token_id not in experience.response_ids[:-1]
        written = tokenizer.decode(experience.response_ids, skip_special_tokens=True)
        assert written.split() == completion(*traces[i]).split()


def test_a_part_of_the_thinking_can_be_left_out(pocket, monkeypatch):
    (model, tokenizer), seen = pocket, []
    encode = module.encode_traces
    monkeypatch.setattr(module, "encode_traces", lambda t, task, traces: seen.extend(traces) or encode(t, task, traces))
    sft(model, tokenizer, TASK, SFTConfig(epochs=1, leave_out=r" = \d+"), progress=False)
    assert [answer for _, answer in seen] == [example.answer for example in TASK]
    assert [thinking for thinking, _ in seen] == [" ".join(example.metadata["word"]) for example in TASK]


def test_without_an_epoch_the_model_stays_as_it_was(pocket):
    model, tokenizer = pocket
    before = [p.clone() for p in model.parameters()]
    assert sft(model, tokenizer, TASK, SFTConfig(epochs=0), progress=False) == []
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) and not model.training


def test_what_is_wrong_with_traces_is_one_sentence(pocket):
    model, tokenizer = pocket
    wrong = [(TASK.thinking(example), "none") for example in TASK]
    for traces, message in [
        (wrong, r"^The verifier accepts none of the 6 traces; check their answers and tags\.$"),
        (wrong[:4], r"^Give one trace for each of the 6 questions, not 4\.$"),
        ([], r"^Give one trace for each of the 6 questions, not 0\.$"),
    ]:
        with pytest.raises(ValueError, match=message):
            sft(model, tokenizer, TASK, SFTConfig(), traces=traces, progress=False)


def test_each_epoch_has_every_trace_once_in_an_order_of_its_own(pocket, monkeypatch):
    (model, tokenizer), seen, collate = pocket, [], module.collate
    monkeypatch.setattr(module, "collate", lambda batch: seen.append(batch) or collate(batch))
    config = SFTConfig(epochs=3, batch_size=1, learning_rate=1e-6)
    for seed in (0, 1, 0):
        sft(model, tokenizer, TASK, config, seed=seed, progress=False)
    order = [tuple(e.prompt_ids) for [e] in seen]
    epochs = [order[at : at + 6] for at in range(0, 54, 6)]
    assert len(order) == 54 and all(set(epoch) == set(order) and len(set(epoch)) == 6 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs[:6]}) == 6  # two seeds, three epochs each
    assert epochs[:3] == epochs[6:]


# --- the learning rate ---


def test_the_rate_rises_stays_and_falls():
    config = SFTConfig(learning_rate=1.0, warmup=0.2, decay=0.5)
    rates = [config.rate(step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    level = SFTConfig(learning_rate=1.0, warmup=0.0, decay=0.0)
    assert [level.rate(step, 10) for step in range(10)] == [1.0] * 10


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 200))
def test_every_update_has_a_rate_above_0_and_at_most_the_one_asked_for(warmup, decay, steps):
    config = SFTConfig(learning_rate=1e-3, warmup=warmup, decay=decay)
    rates = [config.rate(step, steps) for step in range(steps)]
    assert all(0 < rate <= 1e-3 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_the_rate_falls_over_the_traces_that_are_left(pocket):
    """Rejected traces make fewer updates, more questions than `traces` more: the schedule has to know."""
    model, tokenizer = pocket
    traces = [(TASK.thinking(example), example.answer) for example in TASK]
    traces[0] = traces[1] = ("", "none")
    config = SFTConfig(traces=2, epochs=1, batch_size=1, decay=1.0, learning_rate=1e-5)
    for given_traces, n in ((traces, 4), (None, 6)):
        history = sft(model, tokenizer, TASK, config, traces=given_traces, progress=False)
        assert len(history) == n
        assert [r["learning_rate"] for r in history] == pytest.approx([1e-5 * (n - i) / n for i in range(n)])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"traces": 0}, r"^sft\.traces must be 1 or more, not 0\.$"),
        ({"epochs": -1}, r"^sft\.epochs must be 0 or more, not -1\.$"),
        ({"batch_size": 0}, r"^sft\.batch_size must be 1 or more"),
        ({"minibatch_size": 0}, r"^sft\.minibatch_size must be 1 or more"),
        ({"checkpoint_every": 0}, r"^sft\.checkpoint_every must be 1 or more"),
        ({"leave_out": "("}, r"^sft\.leave_out is no regular expression: missing \), unterminated subpattern"),
        ({"warmup": 1.5}, "are shares from 0 to 1"),
        ({"decay": -0.1}, "are shares from 0 to 1"),
        ({"learning_rate": 0.0}, "are above 0"),
        ({"learning_rate": float("nan")}, "are above 0"),
        ({"max_grad_norm": 0.0}, "are above 0"),
    ],
)
def test_wrong_settings_get_one_sentence(setting, message):
    with pytest.raises(ValueError, match=message) as refusal:
        SFTConfig(**setting)
    assert "\n" not in str(refusal.value)
