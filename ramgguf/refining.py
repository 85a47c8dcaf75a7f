"""The Python interface to refinement: one function, from a plan to one that trials made better."""

from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from ramgguf.errors import PlanError
from ramgguf.imatrix import load_imatrix
from ramgguf.objectives import costing
from ramgguf.probe_tokens import Request, parse_tokens
from ramgguf.progress import Progress, Silent
from ramgguf.refine_tokens import Refining
from ramgguf.schema import Measurement, Plan
from ramgguf.sensitivities import Sensitivity
from ramgguf.stages import refine as _refine
from ramgguf.work.opening import opened


def refine(
    model: str | Path,
    plan: Plan,
    measurement: Measurement | str | Path,
    *,
    n_trials: int = 32,
    sensitivity: Sensitivity | str | Path | None = None,
    imatrix: str | Path | None = None,
    tokens: str = "self",
    seed: int = 0,
    journal: str | Path | None = None,
    folder: str | Path | None = None,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Return the plan after trying n_trials swaps of formats by forward passes of llama.cpp.

    measurement, sensitivity and imatrix are those that the plan was made with. The result has no
    more bytes than the plan's budget, and no higher KLD over the tokens that swaps are accepted
    on; its `refinement` says what was swapped, and the KLD over tokens that decided nothing.
    tokens are as in sensitivity; journal keeps every trial, and a run that was killed goes on from
    it; folder takes a copy of the model meanwhile. announce is told the cost before it is spent.
    executor is as in sensitivity.

    Raises GGUFError, ImatrixError, PlanError for what does not belong together, EngineError when
    llama.cpp is missing or fails.
    """
    if not isinstance(measurement, Measurement):
        measurement = Measurement.load(Path(measurement))
    if sensitivity is not None and not isinstance(sensitivity, Sensitivity):
        sensitivity = Sensitivity.load(Path(sensitivity))
    used = costing(plan.objective, measurement, sensitivity)
    if used.sensitivity_sha256 != plan.sensitivity_sha256:
        raise PlanError("the plan was made with another sensitivity file; plan again")
    kind, corpus = parse_tokens(tokens)
    weighed = load_imatrix(Path(imatrix)) if imatrix is not None else None
    if (weighed.source.identity if weighed else None) != (plan.imatrix and plan.imatrix.identity):
        raise PlanError("the plan was made with another importance matrix, or none; give the same")
    request = Request(encoder=plan.encoder, tokens=kind, corpus=corpus, seed=seed, imatrix=weighed)
    with opened(
        model, request, folder=folder, journal=journal, threads=threads, executor=executor
    ) as at:
        return _refine.refine(
            at.file,
            plan,
            measurement,
            used,
            Refining(n_trials, request),
            at.opening,
            journal_path=at.journal,
            progress=progress or Silent(),
            announce=announce,
        )


def refinement_journal(output: Path, plan: Plan) -> Path:
    """Return where the trials for an output are kept until it is written: beside it."""
    return output.with_name(f"{output.stem}-{plan.sha256()[:12]}.refine.partial")
