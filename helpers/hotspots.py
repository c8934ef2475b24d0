"""Where a contestant's time goes, by kind of operation, as torch's profiler sees it."""

import multiprocessing
from typing import Any

import torch

KINDS = {  # the first kind with a word that is in the operation's name
    "attention": ("dot_product", "flash_attention"),
    "matrix products": ("mm", "linear", "matmul", "mkldnn", "mkl::"),
    "copies and conversions": ("copy", "cat", "index", "clone", "contiguous", "zero", "empty", "fill", "gather",
                               "scatter", "embedding", "pad", "expand", "select", "slice", "reshape", "view"),
}  # fmt: skip
REST = "other operations (norms, activations, sampling, optimiser)"
OUTSIDE = "between the operations (Python, dispatch)"


def kind_of(name: str) -> str:
    """The kind an operation belongs to, by its name in the profile."""
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), REST)


def shares(events: list[tuple[str, float]], seconds: float) -> dict[str, float]:
    """Each kind's share of `seconds`, from (name, own seconds) of operations; what is missing was between them."""
    found = dict.fromkeys([*KINDS, REST], 0.0)
    for name, own in events:
        found[kind_of(name)] += own / seconds
    return found | {OUTSIDE: max(0.0, 1 - sum(found.values()))}


def _profile(name: str, job: Any) -> dict[str, float]:
    from helpers.benchmark import CONTESTANTS

    torch.set_num_threads(job.threads)
    contestant = CONTESTANTS[name](job)
    for _ in range(2):  # ready, and once unseen
        next(contestant)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        with torch.profiler.record_function("all of it"):
            next(contestant)
    averages = profile.key_averages()
    [whole] = [e for e in averages if e.key == "all of it"]
    events = [(e.key, e.self_cpu_time_total / 1e6) for e in averages if e.key != "all of it"]
    return shares(events, whole.cpu_time_total / 1e6)


def hotspots(name: str, job: Any) -> dict[str, float]:
    """Shares of a contestant's second round, in a process of its own. The backward pass's thread counts as well."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_profile, (name, job))
