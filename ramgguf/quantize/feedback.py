"""Plans for error feedback: formats chosen by the errors of search, encoded by gptq.

GPTQ's own errors are measured on the tokens they were minimised on, and promise more than other
text keeps: plans by them are worse than its rounding of a searched plan (docs/findings.md).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan
from ramgguf.quants.encoders import Encoder
from ramgguf.quants.imatrix import Imatrix

NOTE = "planned by the errors of search; error feedback ({}) lowers what these predict"

Measure = Callable[..., Measurement]


def first_measure(
    measure: Measure, encoder: Encoder, imatrix: Imatrix | None, wanted: tuple[str, ...] | None
) -> Measure:
    """Return how what is planned with is measured: for gptq, what search would do."""
    if encoder.plans_by is None:
        return partial(measure, encoder=encoder.name, imatrix=imatrix, wanted=wanted)
    plain = None if imatrix is None else replace(imatrix, hessians=None)
    return partial(measure, encoder=encoder.plans_by, imatrix=plain, wanted=wanted)


def fed_back(plan: Plan, encoder: Encoder, imatrix: Imatrix | None) -> Plan:
    """Return the plan for the encoder; its errors are known once it is written."""
    return plan.model_copy(
        update={
            "encoder": encoder.name,
            "imatrix": None if imatrix is None else imatrix.source,
            "notes": (*plan.notes, NOTE.format(encoder.name)),
        }
    )
