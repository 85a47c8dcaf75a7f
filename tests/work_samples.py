"""Small runs whose passes go to an executor or stay in this process, for tests to compare."""

from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import ramgguf
from ramgguf.cluster.runners import open_runner
from ramgguf.core.corpus import Corpus, default_corpus
from ramgguf.core.progress import Progress, Silent
from ramgguf.evaluate.evaluation import Evaluation, score_models
from ramgguf.evaluate.protocol import EvalProtocol
from ramgguf.evaluate.result import EvalResult
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.tokens import TokenRequest
from ramgguf.measure.result import Measurement
from ramgguf.plan.objectives import costing
from ramgguf.plan.result import Plan
from ramgguf.refine.swaps import refine_plan
from ramgguf.refine.tokens import Refining
from ramgguf.sensitivity.alpha import measure_alpha
from ramgguf.sensitivity.result import Sensitivity

QUICK = TokenRequest(encoder="rtn", n_sequences=2, n_ctx=64)
RECIPE = EvalProtocol(Corpus("excerpt", default_corpus().text[:6000]), n_ctx=64, n_seq=20)
REFINING = Refining(6, TokenRequest(encoder="rtn", n_ctx=48), sizes=(2, 1, 1))


def measured(
    model: Path, folder: Path, executor: Executor | None = None, progress: Progress | None = None
) -> Sensitivity:
    """Return the model's sensitivity; the journal is in the folder."""
    with open_gguf(model) as file:
        return measure_alpha(
            file,
            QUICK,
            open_runner(file, QUICK, scratch=folder, threads=1, executor=executor),
            journal_path=folder / "journal",
            progress=progress or Silent(),
        )


def scored(
    models: list[Path],
    journal: Path,
    executor: Executor | None = None,
    progress: Progress | None = None,
    *,
    safe_kernels: bool | None = True,
) -> Evaluation:
    """Return the scores of the models against the first; what the journal has is kept."""
    return score_models(
        models,
        reference=models[0],
        protocol=RECIPE,
        threads=1,
        safe_kernels=safe_kernels,
        jsonl=journal,
        resume=True,
        executor=executor,
        progress=progress,
    )


def untimed(evaluation: Evaluation) -> list[EvalResult]:
    """Return the results without how long they took."""
    zero = {"seconds": 0.0, "decode_seconds": 0.0}
    return [r.model_copy(update=zero) for r in evaluation.results]


def timeless(found: Sensitivity) -> Sensitivity:
    """Return the sensitivity without how long it took."""
    return found.model_copy(update={"seconds": 0.0})


def plan_and_curves(model: Path) -> tuple[Plan, Measurement]:
    """Return a plan that spends its bytes where they do little, and what it was made from."""
    curves = ramgguf.measure(model, formats=["Q4_0", "Q5_0", "Q8_0"], encoder="rtn", threads=1)
    return ramgguf.plan(curves, "35%", objective="ram"), curves


def refined(
    model: Path,
    made: tuple[Plan, Measurement],
    folder: Path,
    executor: Executor | None = None,
    progress: Progress | None = None,
    *,
    n_trials: int = REFINING.n_trials,
) -> Plan:
    """Return the plan after some trials; the journal is in the folder."""
    plan, curves = made
    request = REFINING.request
    with open_gguf(model) as file:
        return refine_plan(
            file,
            plan,
            curves,
            costing(plan.objective, curves),
            replace(REFINING, n_trials=n_trials),
            open_runner(file, request, scratch=folder, threads=1, executor=executor),
            journal_path=folder / "journal",
            progress=progress or Silent(),
        )
