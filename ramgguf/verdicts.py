"""The Python interface's last stages: does a file run here, and which of several is better."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ramgguf.footprint import parse_cache_types
from ramgguf.footprint_formula import Shape
from ramgguf.hub import local_path
from ramgguf.machine import memory_limit
from ramgguf.parallel import default_threads
from ramgguf.results import EvalResult
from ramgguf.stages.evaluate import Evaluation

if TYPE_CHECKING:  # every child process imports the package, and none needs these
    from ramgguf.check_result import CheckResult
    from ramgguf.leaderboard import Leaderboard

_SEED = 42  # of the resampling behind intervals and p-values, as on the command line


def check(
    model: str | Path,
    memory: str | None = None,
    context: int = 4096,
    *,
    cache_type: str = "f16",
    reference: str | Path | None = None,
    repeats: int = 5,
    threads: int | None = None,
) -> "CheckResult":
    """Return what a deployment test of the file finds: passed, or failures and advice.

    It is tried in a process of its own, under memory (16GB; None: what is left here) and with that
    many tokens of context really filled. With a reference, that model judges what it says. Raises
    GGUFError for a file that is none, EngineError when llama.cpp is missing.
    """
    from ramgguf import checking

    request = checking.CheckRequest(
        Shape(context, 1, *parse_cache_types(cache_type)),
        memory_limit(memory),
        n_threads=threads or default_threads(),
        n_repeats=repeats,
    )
    judge = None if reference is None else local_path(reference)
    return checking.check(local_path(model), request, reference=judge)


def compare(results: Evaluation | Sequence[EvalResult]) -> "Leaderboard":
    """Return rankings by several criteria, and where they disagree or cannot tell models apart.

    Raises ResultError when the results were not measured alike.
    """
    from ramgguf.comparison import compare as compare_results

    found = results.results if isinstance(results, Evaluation) else results
    return compare_results(found, np.random.default_rng(_SEED))
