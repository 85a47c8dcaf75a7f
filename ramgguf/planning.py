"""The Python interface to plans: they are made, compared and explained from numbers alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from ramgguf.curves import Frontier
from ramgguf.errors import BudgetError, PlanError
from ramgguf.explain import PlanExplanation
from ramgguf.explain import explain as _explain
from ramgguf.format_sets import expand
from ramgguf.gguf_io import GGUFFile, open_gguf
from ramgguf.hub import local_path
from ramgguf.memory import MemoryPlanner, MemoryRequest
from ramgguf.objectives import Costing, costing
from ramgguf.problem import Problem, parse_tie
from ramgguf.recipes import Difference, Recipe, pins_for
from ramgguf.recipes import diff as _diff
from ramgguf.schema import Constraints, Measurement, MinFormat, Pin, Plan, Source
from ramgguf.sensitivities import Sensitivity
from ramgguf.stages import allocate as _allocate
from ramgguf.stages import frontier as _frontier
from ramgguf.units import parse_budget

DEFAULT_MIN_SQNR_DB = 9.0


class PlanOptions(TypedDict, total=False):
    """What is minimised, and what a plan must respect.

    objective None is the best known: sensitivity where one is given (a value or its file), else
    weighted. formats are those to choose from, or sets of them (None: all measured); pins are
    'regex=FORMAT', min_formats 'role=FORMAT'; a tie is 'qkv', 'gate-up' or a list 'role,role'.
    """

    objective: str | None
    sensitivity: Sensitivity | str | Path | None
    min_sqnr_db: float
    formats: Sequence[str] | None
    pins: Sequence[str]
    ties: Sequence[str]
    min_formats: Sequence[str]


def plan(
    measurement: Measurement | str | Path, budget: int | str, **options: Unpack[PlanOptions]
) -> Plan:
    """Return the plan of least cost whose output has at most `budget` bytes.

    measurement is one, or the file of one; budget is bytes or text such as 16GB, 16GiB, 4.5bpw or
    30%. Raises BudgetError with the smallest feasible size when nothing fits, PlanError for
    options that do not suit the measurement.
    """
    measurement = _loaded(measurement)
    return _allocate.allocate(
        measurement,
        budget_bytes(budget, measurement.n_weights, measurement.source.n_bytes),
        costing=_costing(measurement, options),
        constraints=_constraints(options),
    )


def plan_within(
    measurement: Measurement | str | Path,
    memory: MemoryRequest,
    budget: int | str | None = None,
    *,
    model: str | Path | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Return the plan of least cost that fits the memory, and the budget if one is given.

    The header of the model (by default where it was measured) tells its cache. Raises BudgetError
    with the longest context that fits when nothing does, else as plan does.
    """
    measurement = _loaded(measurement)
    with source_model(measurement.source, model) as file, MemoryPlanner(file, memory) as planner:
        most = None
        if budget is not None:
            most = budget_bytes(budget, measurement.n_weights, measurement.source.n_bytes)
        return planner.fit(lambda n_bytes: plan(measurement, n_bytes, **options), most)


def source_model(source: Source, model: str | Path | None) -> GGUFFile:
    """Return the open model that a value was made from; raises PlanError if it is another."""
    path = local_path(model or source.path)
    if model is None and not path.exists():
        raise PlanError(
            f"{path}: the model that was measured is not there, and only its header tells how much "
            "memory a context takes; name it with --model"
        )
    file = open_gguf(path)
    if file.header_sha256 != source.header_sha256:
        file.close()
        raise PlanError(f"{path}: is not the model that was measured ({source.path})")
    return file


def follow(measurement: Measurement | str | Path, recipe: Recipe | str | Path) -> Plan:
    """Return the plan that gives every tensor the format it has in a recipe, plan or GGUF file.

    Raises PlanError when the shapes differ, or a format of the recipe was not measured.
    """
    measurement = _loaded(measurement)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.read(Path(recipe))
    made = plan(measurement, "1000%", pins=pins_for(recipe, measurement))
    return made.model_copy(update={"budget": made.n_bytes, "next_percent": None})


def curve(measurement: Measurement | str | Path, **options: Unpack[PlanOptions]) -> Frontier:
    """Return the best plans of all sizes, up to 8.5 bits per weight; options are those of plan."""
    measurement = _loaded(measurement)
    return _frontier.frontier(
        measurement,
        costing=_costing(measurement, options),
        constraints=_constraints(options),
    )


def plan_on(frontier: Frontier, budget: int | str) -> Plan:
    """Return the frontier's plan for a budget, with its proven gap, without solving again."""
    n_bytes = budget_bytes(budget, frontier.n_weights, frontier.source.n_bytes)
    return _frontier.plan_at(frontier, n_bytes)


def plan_on_within(
    frontier: Frontier,
    memory: MemoryRequest,
    budget: int | str | None = None,
    *,
    model: str | Path | None = None,
) -> Plan:
    """Return the frontier's plan that fits the memory, and the budget if one is given."""
    with source_model(frontier.source, model) as file, MemoryPlanner(file, memory) as planner:
        most = None
        if budget is not None:
            most = budget_bytes(budget, frontier.n_weights, frontier.source.n_bytes)
        return planner.fit(lambda n_bytes: plan_on(frontier, n_bytes), most)


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
    return Problem.of(measurement, _constraints(options), cost)


def _costing(measurement: Measurement, options: PlanOptions) -> Costing:
    sensitivity = _loaded_sensitivity(options.get("sensitivity"))
    return costing(options.get("objective"), measurement, sensitivity)


def _constraints(options: PlanOptions) -> Constraints:
    formats = options.get("formats")
    return Constraints(
        min_sqnr_db=options.get("min_sqnr_db", DEFAULT_MIN_SQNR_DB),
        formats=None if formats is None else expand(formats),
        pins=tuple(Pin.parse(pin) for pin in options.get("pins", ())),
        ties=tuple(parse_tie(tie) for tie in options.get("ties", ())),
        min_formats=tuple(MinFormat.parse(text) for text in options.get("min_formats", ())),
    )


def budget_bytes(budget: int | str, n_weights: int, n_bytes_source: int) -> int:
    """Return the bytes that a budget stands for; raises BudgetError when it is none."""
    if isinstance(budget, str):
        return parse_budget(budget, n_weights=n_weights, n_bytes_source=n_bytes_source)
    if budget <= 0:
        raise BudgetError(f"budget is {budget} bytes; it must be positive")
    return budget
