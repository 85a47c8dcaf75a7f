"""Plans for outputs in shards, whose headers count against the budget, too."""

from pathlib import Path

from ramgguf.core.errors import BudgetError
from ramgguf.gguf.reader import GGUFFile
from ramgguf.measure.result import Measurement
from ramgguf.plan import PlanOptions, Pools, plan
from ramgguf.plan.result import Plan
from ramgguf.quantize.write import Destination, planned_layout


def plan_for_shards(
    file: GGUFFile,
    options: PlanOptions,
    split_max_bytes: int | None,
    measurement: Measurement,
    budget: int,
    pools: Pools | None = None,
    projector: Measurement | None = None,
) -> Plan:
    """Return a plan whose files together fit the budget: shards have headers of their own."""
    options = {**options, "pools": pools, "projector": projector}
    for _ in range(8):
        made = plan(measurement, budget, **options)
        if split_max_bytes is None:
            return made
        destination = Destination(Path("x.gguf"), False, split_max_bytes)
        missed = planned_layout(file, made, destination).n_bytes - made.n_bytes
        if missed == 0:
            return made
        overhead = measurement.n_overhead_bytes + missed
        measurement = measurement.model_copy(update={"n_overhead_bytes": overhead})
    raise BudgetError("shards do not settle; raise --split-max-size")
