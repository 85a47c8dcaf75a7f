"""Plans for outputs in shards, whose headers count against the budget, too."""

from pathlib import Path

from ramgguf.errors import BudgetError
from ramgguf.gguf_io import GGUFFile
from ramgguf.planning import PlanOptions, plan
from ramgguf.schema import Measurement, Plan
from ramgguf.stages import quantize as _quantize


def plan_for_shards(
    file: GGUFFile,
    options: PlanOptions,
    split_max_bytes: int | None,
    measurement: Measurement,
    budget: int,
) -> Plan:
    """Return a plan whose files together fit the budget: shards have headers of their own."""
    for _ in range(8):
        made = plan(measurement, budget, **options)
        if split_max_bytes is None:
            return made
        destination = _quantize.Destination(Path("x.gguf"), False, split_max_bytes)
        missed = _quantize.planned_layout(file, made, destination).n_bytes - made.n_bytes
        if missed == 0:
            return made
        overhead = measurement.n_overhead_bytes + missed
        measurement = measurement.model_copy(update={"n_overhead_bytes": overhead})
    raise BudgetError("shards do not settle; raise --split-max-size")
