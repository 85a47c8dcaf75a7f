"""Plans for error feedback: formats chosen by the errors of search, encoded by gptq.

GPTQ's own errors are measured on the tokens they were minimised on, and promise more than other
text keeps: plans by them are worse than its rounding of a searched plan (docs/findings.md).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ramgguf.core.errors import FormatError
from ramgguf.measure.result import Measurement, TensorMeasurement
from ramgguf.plan.result import Assignment, Plan
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


def fed_back(plan: Plan, measure: Measure, encoder: Encoder, imatrix: Imatrix | None) -> Plan:
    """Return the plan for the encoder, with the errors that it makes in the plan's formats.

    Raises FormatError where it can make none in that of a tensor.
    """
    only = {a.name: frozenset({a.format}) for a in plan.assignments}
    used = tuple(sorted({a.format for a in plan.assignments if a.format != a.source_format}))
    measured = measure(encoder=encoder.name, imatrix=imatrix, wanted=used, only=only)
    tensors = {t.name: t for t in measured.tensors}
    return plan.model_copy(
        update={
            "encoder": measured.encoder,
            "imatrix": measured.imatrix,
            "assignments": tuple(
                _with_error(a, tensors[a.name], encoder) for a in plan.assignments
            ),
            "notes": (*plan.notes, NOTE.format(encoder.name)),
        }
    )


def _with_error(planned: Assignment, tensor: TensorMeasurement, encoder: Encoder) -> Assignment:
    point = next((p for p in tensor.points if p.format == planned.format), None)
    if point is None:
        why = tensor.excluded.get(planned.format, "it was not measured")
        raise FormatError(
            f"{planned.name} cannot be encoded in {planned.format} by {encoder.name}: {why}"
        )
    return planned.model_copy(update={"nmse": point.nmse})
