"""Converts a Sensitivity to other error weights, without running the model."""

from pathlib import Path

from ramgguf.core.progress import Progress, Silent
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.identity import require_model
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.quants.codec import ErrorWeights
from ramgguf.quants.coverage import coverage_notes
from ramgguf.quants.imatrix import Imatrix, load_importance, planned_imatrix
from ramgguf.quants.roundtrip import simulated
from ramgguf.sensitivity.impute import Member, impute
from ramgguf.sensitivity.result import Sensitivity


def reweighed(
    file: GGUFFile, sensitivity: Sensitivity, imatrix: Imatrix | None, progress: Progress
) -> Sensitivity:
    """Return the sensitivities per unit of the error that another importance matrix weighs.

    Nothing is measured again: the KLD of a reading is that of one quantization, which is made once
    more, and its error is weighed in the other way. Raises PlanError for another model,
    ImatrixError for another model's matrix.
    """
    require_model("the sensitivity", sensitivity.source, file)
    notes = coverage_notes(file, imatrix)
    before = planned_imatrix(sensitivity.imatrix)
    known = {
        r.name: r.format
        for t in sensitivity.tensors
        for r in (t.reading, t.layer_reading)
        if r is not None
    }
    errors: dict[str, float] = {}
    progress.start("reweigh", len(known), "tensors")
    try:
        for name, format_name in known.items():
            tensor = file.tensor(name)
            data, _ = simulated(
                file, tensor, format_name, encoder=sensitivity.encoder, imatrix=before
            )
            scale = ErrorWeights.of(tensor, imatrix)
            rows = file.read_rows(tensor, 0, tensor.n_rows)
            stats = scale.compare(tensor.type_name, rows, tensor.type_name, data, 0)
            squares = scale.squares(stats)
            errors[name] = scale.error(stats.errors[0]) / squares if squares else 0.0
            progress.advance(1)
    finally:
        progress.finish()
    readings = {
        t.name: t.reading.model_copy(update={"nmse": errors[t.name]})
        for t in sensitivity.tensors
        if t.reading is not None
    }
    layer_readings = {
        t.name: t.layer_reading.model_copy(update={"nmse": errors[t.name]})
        for t in sensitivity.tensors
        if t.layer_reading is not None
    }
    members = [Member(t.name, t.role, t.layer, t.n_weights) for t in sensitivity.tensors]
    update = {
        "imatrix": imatrix.source if imatrix else None,
        "tensors": impute(members, readings, layer_readings),
        "notes": (*sensitivity.notes, *(n for n in notes if n not in sensitivity.notes)),
    }
    return sensitivity.model_copy(update=update)


def reweigh(
    sensitivity: Sensitivity | str | Path,
    model: str | Path,
    imatrix: str | Path | None,
    *,
    hessian: str | Path | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Return sensitivities per unit of the error that the importance matrix weighs, unmeasured.

    The readings' quantizations are made again and their errors weighed anew; no model is run.
    Raises PlanError when the sensitivity is of another model.
    """
    if not isinstance(sensitivity, Sensitivity):
        sensitivity = Sensitivity.load(Path(sensitivity))
    with open_gguf(local_path(model), kind_check=True) as file:
        return reweighed(file, sensitivity, load_importance(imatrix, hessian), progress or Silent())
