"""One sentence for a name that does not exist."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """The sentence: what was asked for does not exist, and the nearest name that does, or all of them."""
    choices = list(choices)
    near = get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(choices)}."
    return f"There is no {kind} {name!r}; {hint}"
