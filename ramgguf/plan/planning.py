"""The Python interface to plans: they are made, compared and explained from numbers alone."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack

from ramgguf.core.errors import PlanError
from ramgguf.measure.result import Measurement
from ramgguf.plan import allocate as _allocate
from ramgguf.plan import frontier as _frontier
from ramgguf.plan.explanation import PlanExplanation
from ramgguf.plan.explanation import explain as _explain
from ramgguf.plan.frontier_result import Frontier
from ramgguf.plan.limits import PlanAt, SizeLimit, SourceSize, size_limit
from ramgguf.plan.objectives import Costing, costing
from ramgguf.plan.pools import Pools
from ramgguf.plan.problem import Problem, parse_tie
from ramgguf.plan.recipes import Difference, Recipe, pins_for
from ramgguf.plan.recipes import diff as _diff
from ramgguf.plan.result import DEFAULT_MIN_SQNR_DB, Constraints, MinFormat, Pin, Plan
from ramgguf.plan.speed import SpeedLimit
from ramgguf.plan.speed_front import SpeedFront
from ramgguf.plan.speed_front import speed_front as _speed_front
from ramgguf.plan.targets import target_ties
from ramgguf.quants.formats import expand
from ramgguf.sensitivity.result import Sensitivity

_MOST_DB = 1000.0  # far more than float32 has


class PlanOptions(TypedDict, total=False):
    """What is minimised, and what a plan must respect.

    objective None is the best known: posterior where a sensitivity is given (a value or its file),
    else weighted. formats are those to choose from, or sets of them (None: all measured); pins are
    'regex=FORMAT', min_formats 'role=FORMAT'; a tie is 'qkv', 'gate-up' or a list 'role,role'.
    target is a program that runs the file (TARGETS): 'vllm' ties what it fuses. speed is how fast
    a plan must be on a machine whose formats were timed. pools, and a projector that is planned as
    well, are set by limits of memory.
    """

    objective: str | None
    sensitivity: Sensitivity | str | Path | None
    min_sqnr_db: float
    formats: Sequence[str] | None
    pins: Sequence[str]
    ties: Sequence[str]
    min_formats: Sequence[str]
    target: str | None
    speed: SpeedLimit | None
    pools: Pools | None
    projector: Measurement | None


def plan(
    curves: Measurement | Frontier | str | Path,
    budget: int | str | SizeLimit,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Return the plan of least cost whose output keeps to the budget.

    curves is a Measurement, or its file; or a Frontier, whose own steps are then taken, without
    solving again and without options. budget is bytes, text such as 16GB, 16GiB, 4.5bpw or 30%, or
    any SizeLimit. Raises BudgetError with the smallest feasible size when nothing fits, PlanError
    for options that do not suit the measurement.
    """
    if isinstance(curves, Frontier):
        if options:
            raise PlanError("a frontier was made with its options; plan from the measurement")
        return _plan(curves, budget, partial(_frontier.plan_at, curves))
    measurement = _loaded(curves)
    allocate = partial(
        _allocate.allocate,
        measurement,
        costing=_costing(measurement, options),
        constraints=_constraints(measurement, options),
        speed=options.get("speed"),
    )

    def plan_at(
        budget: int, pools: Pools | None = None, projector: Measurement | None = None
    ) -> Plan:
        return allocate(
            budget,
            pools=options.get("pools") if pools is None else pools,
            projector=options.get("projector") if projector is None else projector,
        )

    return _plan(measurement, budget, plan_at)


def _plan(curves: Measurement | Frontier, limit: int | str | SizeLimit, plan_at: PlanAt) -> Plan:
    source = SourceSize.measured(curves.source, curves.n_weights)
    with size_limit(limit).room(source) as room:
        return room.plan(plan_at)


def follow(measurement: Measurement | str | Path, recipe: Recipe | str | Path) -> Plan:
    """Return the plan that gives every tensor the format it has in a recipe, plan or GGUF file.

    Raises PlanError when the shapes differ, or a format of the recipe was not measured.
    """
    measurement = _loaded(measurement)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.read(Path(recipe))
    pins = pins_for(recipe, measurement)
    made = plan(measurement, plan(measurement, "1000%", pins=pins).n_bytes, pins=pins)
    return made.model_copy(update={"next_percent": None})


def curve(measurement: Measurement | str | Path, **options: Unpack[PlanOptions]) -> Frontier:
    """Return the best plans of all sizes, up to 8.5 bits per weight; options are those of plan."""
    measurement = _loaded(measurement)
    return _frontier.frontier(
        measurement,
        costing=_costing(measurement, options),
        constraints=_constraints(measurement, options),
    )


def speed_front(
    measurement: Measurement | str | Path, limit: SpeedLimit, **options: Unpack[PlanOptions]
) -> SpeedFront:
    """Return the best plans by size, cost and speed on the machine of the limit."""
    measurement = _loaded(measurement)
    return _speed_front(
        measurement,
        limit,
        costing=_costing(measurement, options),
        constraints=_constraints(measurement, options),
    )


def explain(
    plan: Plan,
    measurement: Measurement | str | Path,
    sensitivity: Sensitivity | str | Path | None = None,
) -> PlanExplanation:
    """Return why every tensor of a plan has its format, and what its next steps would bring."""
    return _explain(plan, _loaded(measurement), _loaded_sensitivity(sensitivity))


def diff(a: str | Path, b: str | Path) -> Difference:
    """Return the tensors to which two plans, recipes or GGUF files give different formats."""
    return _diff(Recipe.read(Path(a)), Recipe.read(Path(b)))


def _loaded(measurement: Measurement | str | Path) -> Measurement:
    if isinstance(measurement, Measurement):
        return measurement
    return Measurement.load(Path(measurement))


def _loaded_sensitivity(sensitivity: Sensitivity | str | Path | None) -> Sensitivity | None:
    if sensitivity is None or isinstance(sensitivity, Sensitivity):
        return sensitivity
    return Sensitivity.load(Path(sensitivity))


def problem(measurement: Measurement, options: PlanOptions) -> Problem:
    """Return the knapsack that plans with these options solve."""
    cost = _costing(measurement, options).cost
    return Problem.of(measurement, _constraints(measurement, options), cost)


def _costing(measurement: Measurement, options: PlanOptions) -> Costing:
    sensitivity = _loaded_sensitivity(options.get("sensitivity"))
    return costing(options.get("objective"), measurement, sensitivity)


def _constraints(measurement: Measurement, options: PlanOptions) -> Constraints:
    formats, target = options.get("formats"), options.get("target")
    least = options.get("min_sqnr_db", DEFAULT_MIN_SQNR_DB)
    if not abs(least) <= _MOST_DB:
        raise PlanError(f"the least SQNR is {least:g} dB; expected at most {_MOST_DB:g}")
    if formats is not None and not formats:
        raise PlanError("there are no formats to choose from; name some, or leave --formats out")
    ties = [parse_tie(tie) for tie in options.get("ties", ())]
    if target is not None:
        ties += [tie for tie in target_ties(target, measurement) if tie not in ties]
    return Constraints(
        min_sqnr_db=least,
        formats=None if formats is None else expand(formats),
        pins=tuple(Pin.parse(pin) for pin in options.get("pins", ())),
        ties=tuple(ties),
        min_formats=tuple(MinFormat.parse(text) for text in options.get("min_formats", ())),
        target=target,
    )
