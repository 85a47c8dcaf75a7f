"""From a Sensitivity to one whose errors are weighed in another way, without running the model."""

from ramgguf.errors import PlanError
from ramgguf.fill_in import fill_in
from ramgguf.gguf_io import GGUFFile
from ramgguf.imatrix import Imatrix, planned_imatrix
from ramgguf.probed import is_probed, member, nmse, quantized
from ramgguf.progress import Progress
from ramgguf.sensitivities import Reading, Sensitivity
from ramgguf.weighing import Scale


def reweighed(
    file: GGUFFile, sensitivity: Sensitivity, imatrix: Imatrix | None, progress: Progress
) -> Sensitivity:
    """Return the sensitivities per unit of the error that another importance matrix weighs.

    Nothing is measured again: the KLD of a reading is that of one quantization, which is made once
    more, and its error is weighed in the other way. Raises PlanError for another model.
    """
    theirs = sensitivity.source
    if (file.header_sha256, file.n_bytes) != (theirs.header_sha256, theirs.n_bytes):
        raise PlanError(f"the sensitivity is of {theirs.path}, another model than {file.paths[0]}")
    before = planned_imatrix(sensitivity.imatrix)
    known = {t.name: t.reading for t in sensitivity.tensors if t.reading is not None}
    tensors = [t for t in file.tensors if is_probed(file, t)]
    readings: dict[str, Reading] = {}
    progress.start("reweigh", len(known), "tensors")
    try:
        for tensor in (t for t in tensors if t.name in known):
            reading, rows = known[tensor.name], file.read_rows(tensor, 0, tensor.n_rows)
            made = Scale.of(tensor, before)
            data = quantized(rows, tensor, reading.format, sensitivity.encoder, made)
            error = nmse(rows, data, tensor, Scale.of(tensor, imatrix))
            readings[tensor.name] = reading.model_copy(update={"nmse": error})
            progress.advance(1)
    finally:
        progress.finish()
    update = {
        "imatrix": imatrix.source if imatrix else None,
        "tensors": fill_in([member(file, t) for t in tensors], readings),
    }
    return sensitivity.model_copy(update=update)
