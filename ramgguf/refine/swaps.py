"""From a Plan to a better one: swaps of formats tried by forward passes of llama.cpp.

The plan rests on a sum over tensors. What the sum misses (its αs' errors, curvature, tensors that
act together) shows when the whole plan runs. So one loaded copy of the model gets the plan's
weights, decoded to the source's own type; then one swap after another is written into it. A swap
is proposed by what the tokens of one set have shown so far, taken only if it lowers the KLD over a
second set by more than its standard error, and the result is reported over a third.
"""

import itertools
import math
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from pathlib import Path

from ramgguf.cluster.runners import opened
from ramgguf.core.errors import EngineError, PlanError
from ramgguf.core.progress import Progress, Silent
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.identity import require_model
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama.forward import ForwardRunner, require_same_logits
from ramgguf.llama.patched_weights import Floats
from ramgguf.llama.sources import of_sources
from ramgguf.llama.token_statistics import standard_error
from ramgguf.llama.tokens import TokenRequest
from ramgguf.measure.result import Measurement
from ramgguf.plan import Costing, DividedPlan, Problem, costing, price
from ramgguf.plan.result import FormatChange, Plan, Refinement
from ramgguf.quants.imatrix import load_imatrix
from ramgguf.refine.journal import Paired, RefineJournal, Trial
from ramgguf.refine.plan_state import PlanState, TokenSet
from ramgguf.refine.posterior import Move, Posterior
from ramgguf.refine.tokens import Refining, same, settle
from ramgguf.sensitivity.result import Sensitivity

# How far a tensor's share of a whole plan's KLD is from α · NMSE, beyond α's sampling error, and
# under priors alone: relative standard deviations, docs/allocation.md.
MODEL_ERROR = 0.3
PRIOR_ERROR = 0.7


def refine_plan(
    file: GGUFFile,
    plan: Plan,
    measurement: Measurement,
    costing: Costing,
    wanted: Refining,
    opening: AbstractContextManager[ForwardRunner],
    *,
    journal_path: Path,
    progress: Progress,
    announce: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Return the plan after the trials: of no more bytes than its budget, with its Refinement.

    Its KLD over the acceptance tokens is no higher than the plan's. journal_path takes the trials,
    from which a run that was killed goes on, wherever its passes run. announce gets the cost
    before it is spent. Raises EngineError when llama.cpp fails, PlanError when the plan was not
    made from this measurement and objective.
    """
    require_model("the plan", plan.source, file)
    require_model("the measurement", measurement.source, file)
    problem = Problem.of(measurement, plan.constraints, costing.cost)
    chosen = _chosen(problem, plan)
    with RefineJournal(journal_path) as journal, opening as passes:
        if journal.settings is None:
            journal.begin(settle(plan, wanted, passes, announce))
        settings = journal.settings
        if settings is None or not same(settings, plan, wanted):
            raise PlanError(
                f"{journal_path} is of another plan or choice of tokens; remove it to start anew"
            )
        sequences = [ids for part in settings.sets for ids in part]
        require_same_logits(passes, sequences, settings.fingerprint, journal_path)
        if journal.steps:
            announce(f"{settings.promise}; {len(journal.steps)} are tried")
        planned = PlanState(file, passes)
        sets = [TokenSet(part, planned) for part in settings.sets]
        width = max(1, passes.n_workers // wanted.sizes[0])
        divided = None
        if plan.division is not None:
            tied = file.has_tied_embedding
            divided = DividedPlan(problem, plan, chosen, file.n_layers or 0, tied=tied)
        run = _Run(problem, plan, chosen, costing, planned, sets, width, divided)
        run.go(wanted.n_trials, journal, progress)
        refined = run.result(settings.tokens, settings.seed, passes.cpus)
        run.check_restored()
        return refined


def _chosen(problem: Problem, plan: Plan) -> list[int]:
    """Return the plan's choice for every group; raises PlanError when it has none."""
    chosen = []
    for group in problem.groups:
        now = plan.assignments[group.members[0]]
        names = [row[0].format for row in group.points]
        if now.format not in names:
            raise PlanError(f"{now.name}: {now.format} is not among what the measurement allows")
        chosen.append(names.index(now.format))
    return chosen


class _Run:
    """A refinement under way: the plan as it stands, and the copy that has its weights."""

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        chosen: list[int],
        costing: Costing,
        weights: PlanState,
        sets: list[TokenSet],
        width: int,
        divided: DividedPlan | None,
    ) -> None:
        self._divided = divided
        self._problem, self._plan, self._costing = problem, plan, costing
        self._weights, self._sets, self._width = weights, sets, width
        self._chosen = chosen
        for a in plan.assignments:
            weights.put(a.name, a.format)
        for part in sets:
            part.current()
        total = sum(self._group_cost(i) for i in range(len(self._chosen)))
        kld = float(sets[0].current().mean())
        self._posterior = Posterior(kld / total if total > 0 else 0.0, self._errors())
        self._price = price(problem.items, plan.budget - plan.n_overhead_bytes)
        self._tried: set[tuple[FormatChange, ...]] = set()
        self._swaps: list[tuple[FormatChange, ...]] = []

    def go(self, n_trials: int, journal: RefineJournal, progress: Progress) -> None:
        """Make the trials, those in the journal without measuring again."""
        done = iter(tuple(journal.steps))
        progress.start("refine", n_trials, "swaps")
        try:
            for _ in range(n_trials):
                moves = self._next()
                if not moves:
                    break  # no swap has an expected improvement
                move, swap = moves[0], self._swap(moves[0])
                trial = next(done, None)
                if trial is None:
                    self._look_ahead(moves)
                    trial = self._trial(move, swap)
                    self._weights.file.require_unchanged()
                    journal.add(trial)
                elif trial.swap != swap:
                    raise PlanError("the journal's trials are not those of this run; remove it")
                elif trial.taken:
                    self._put(move)
                    self._forget()
                self._learn(move, trial)
                progress.advance(1)
        finally:
            progress.finish()

    def _next(self) -> list[Move]:
        """Return the most promising moves that were not tried, as many as run side by side."""
        items, room = self._problem.items, self._plan.budget - self._n_bytes()
        proposals = self._posterior.proposals(items, self._chosen, room, self._price)
        untried = (
            move
            for move in proposals
            if self._swap(move) not in self._tried
            and (self._divided is None or self._divided.allows(move.changes))
        )
        return list(itertools.islice(untried, self._width))

    def _look_ahead(self, moves: list[Move]) -> None:
        """Let idle workers run what is likely to be proposed after the first of the moves."""
        if len(moves) > 1:
            self._sets[0].current()  # before other tensors change
            self._sets[0].look_ahead([self._swap(move) for move in moves])

    def _trial(self, move: Move, swap: tuple[FormatChange, ...]) -> Trial:
        """Return what the move does; the copy keeps it if it is taken."""
        proposing, accepting, _ = self._sets
        before = proposing.current(), accepting.current()
        self._put(move)
        first = proposing.divergence()
        proposed = _paired(first - before[0])
        accepted: Paired | None = None
        if proposed.change < 0:
            second = accepting.divergence()
            accepted = _paired(second - before[1])
            if accepted.change < -accepted.error:
                self._forget()
                proposing.now, accepting.now = first, second
                return Trial(swap=swap, proposing=proposed, accepting=accepted, taken=True)
        self._put(move, back=True)
        return Trial(swap=swap, proposing=proposed, accepting=accepted, taken=False)

    def _learn(self, move: Move, trial: Trial) -> None:
        self._posterior.observe(move, trial.proposing.change, trial.proposing.error)
        self._tried.add(trial.swap)
        if trial.taken:
            self._swaps.append(trial.swap)
            if self._divided is not None:
                self._divided.take(move.changes)
            for item, choice in move.changes:
                self._chosen[item] = choice

    def _forget(self) -> None:
        """Let the KLD of all tokens be measured again: the plan has changed."""
        for part in self._sets:
            part.now = None

    def _put(self, move: Move, *, back: bool = False) -> None:
        """Write the move into the copy, or what the plan has in its place."""
        for item, choice in move.changes:
            group = self._problem.groups[item]
            row = group.points[self._chosen[item] if back else choice]
            for member, point in zip(group.members, row, strict=True):
                self._weights.put(self._plan.assignments[member].name, point.format)

    def _swap(self, move: Move) -> tuple[FormatChange, ...]:
        changes = []
        for item, choice in move.changes:
            group = self._problem.groups[item]
            before, after = group.points[self._chosen[item]], group.points[choice]
            for member, a, b in zip(group.members, before, after, strict=True):
                name = self._plan.assignments[member].name
                changes.append(FormatChange(name=name, before=a.format, after=b.format))
        return tuple(changes)

    def _group_cost(self, i: int) -> float:
        return self._problem.groups[i].choices[self._chosen[i]].cost

    def _errors(self) -> list[float]:
        """Return how far each group's share of the KLD may be from what its cost says."""
        if not self._costing.errors:
            return [PRIOR_ERROR] * len(self._chosen)
        names = [[self._plan.assignments[m].name for m in g.members] for g in self._problem.groups]
        errors = self._costing.errors
        return [math.hypot(MODEL_ERROR, max(errors.get(n, 0.0) for n in group)) for group in names]

    def _n_bytes(self) -> int:
        pairs = zip(self._problem.groups, self._chosen, strict=True)
        return self._plan.n_overhead_bytes + sum(g.choices[j].n_bytes for g, j in pairs)

    def result(self, tokens: str, seed: int, cpus: tuple[str, ...]) -> Plan:
        """Return the plan as it stands, with what changed and what that did."""
        plan, assignments = self._plan, self._problem.assignments(self._chosen)
        cost = math.fsum(a.cost for a in assignments)
        bound = plan.total_cost * (1 - plan.gap)
        proposal, acceptance, report = (part.change() for part in self._sets)
        return plan.model_copy(
            update={
                "assignments": assignments,
                "n_bytes": self._n_bytes(),
                "total_cost": cost,
                "predicted_kld": self._costing.predicted_kld(assignments, plan.encoder),
                "gap": max(0.0, 1 - bound / cost) if self._swaps and cost > 0 else plan.gap,
                "next_percent": None if self._swaps else plan.next_percent,
                "memory": plan.memory if self._divided is None else self._divided.memory(),
                "refinement": Refinement(
                    tokens=tokens,
                    seed=seed,
                    n_tried=len(self._tried),
                    swaps=tuple(self._swaps),
                    proposal=proposal,
                    acceptance=acceptance,
                    report=report,
                    cpus=cpus,
                ),
            }
        )

    def check_restored(self) -> None:
        """Give the copy the original's weights; raises EngineError when it is not the same then."""
        for a in self._plan.assignments:
            self._weights.put(a.name, a.source_format)
        if self._sets[0].divergence().any():
            raise EngineError("the copy of the model did not come back to the original")


def _paired(differences: Floats) -> Paired:
    return Paired(change=float(differences.mean()), error=standard_error(differences))


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
    it; folder takes a copy of the model meanwhile. announce gets the cost before it is spent.
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
    weighed = load_imatrix(Path(imatrix)) if imatrix is not None else None
    if (weighed.source.identity if weighed else None) != (plan.imatrix and plan.imatrix.encoding):
        raise PlanError("the plan was made with another importance matrix, or none; give the same")
    request = TokenRequest(encoder=plan.encoder, seed=seed, imatrix=weighed)
    with open_gguf(local_path(model), kind_check=True) as file:
        request = of_sources(request, tokens, file)
    with opened(
        model, request, folder=folder, journal=journal, threads=threads, executor=executor
    ) as at:
        return refine_plan(
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
