"""reasoning-gym's own scorers, kept from what breaks them: to compare with numbers that were published with them."""

from functools import cache

from reasoning_gym.factory import ProceduralDataset, create_dataset

from helpers import logic
from helpers.tasks import Example, Task


@cache
def _scorer(name: str) -> ProceduralDataset:
    return create_dataset(name, size=1, seed=0)


def stock_score(answer: str | None, example: Example, task: Task) -> float:
    """What reasoning-gym 0.1.25 gives an extracted answer, in [0, 1], by its own label where it has one.

    It pays for parts: "Yes." gets 0.75, "Yes No" about 0.4, a copied premise 1, a formula that does not follow 0.05.
    A formula that our parser refuses gets 0 here: there its scorer recurses without end, or tries 2^n cases.
    """
    if not answer:
        return 0.0
    metadata = example.metadata
    if task.name == "propositional_logic":
        try:
            logic.parse_formula(answer, metadata["variables"])
        except logic.FormulaError:
            return 0.0
    label = metadata.get("stock_label", example.answer)
    return float(_scorer(task.name).score_answer(answer, {"answer": label, "metadata": metadata}))
