"""The system prompt, the chat messages and the tags that thinking and answer stand in."""

import re

SYSTEM_PROMPT = (
    "Answer the user's question. First think it through step by step between <think> and </think>. "
    "Then give the final answer, and nothing else, between <answer> and </answer>. "
    "Your reply has exactly this shape:\n"
    "<think> your steps </think>\n"
    "<answer> your final answer </answer>"
)

# The text inside holds no further answer tag, so a search takes time in proportion to the text's length.
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def messages(question: str) -> list[dict[str, str]]:
    """The chat of one question, system and user, ready for a tokenizer's `apply_chat_template`."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]


def completion(thinking: str, answer: str) -> str:
    """The reply the warm-up trains on. Blanks around the tags let them tokenise alike whatever they hold."""
    return f"<think> {thinking} </think>\n<answer> {answer} </answer>"


def extract_answer(completion: str) -> str | None:
    """The last complete answer after the thinking, without white space around it; None when there is none.

    The thinking ends at the last </think>; a reply without one is searched whole. Tags are case-sensitive.
    """
    answers = _ANSWER.findall(completion.rpartition("</think>")[2])
    return answers[-1].strip() if answers else None


def extract_thinking(completion: str) -> str | None:
    """What stands between the first <think> and the last </think>; None when either is missing."""
    before_end, end, _ = completion.rpartition("</think>")
    _, start, thinking = before_end.partition("<think>")
    return thinking.strip() if start and end else None
