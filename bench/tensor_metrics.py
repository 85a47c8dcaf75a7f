"""Metrics of a tensor's quantization that need no forward pass."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.quants.codec import ErrorWeights
from ramgguf.quants.imatrix import Imatrix

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """What can be said of one tensor's quantization without running the model on it.

    alpha_nmse is α · NMSE, α measured at one format with other tokens.
    """

    nmse: float
    nrmse: float
    negative_sqnr_db: float
    max_error: float
    one_minus_cosine: float
    squared_error: float
    n_times_nmse: float
    excess_kurtosis: float
    activation_nmse: float
    activation_error: float
    output_nmse: float
    output_error: float
    alpha_nmse: float


@dataclass(frozen=True)
class Original:
    """A tensor as it is, and what its formats share."""

    tensor: TensorInfo
    rows: NDArray[np.uint8]
    weights: Floats
    excess_kurtosis: float
    plain: ErrorWeights
    activation: ErrorWeights
    output: ErrorWeights

    @classmethod
    def of(cls, file: GGUFFile, tensor: TensorInfo, imatrix: Imatrix) -> "Original":
        rows = file.read_rows(tensor, 0, tensor.n_rows)
        x = _decoded(tensor, rows)
        squares = np.square(x - x.mean())
        kurtosis = float(np.mean(np.square(squares)) / np.mean(squares) ** 2 - 3)
        output = ErrorWeights.of(tensor, imatrix)
        activation = ErrorWeights(output.importance, output.rows_per_expert)
        return cls(tensor, rows, x, kurtosis, ErrorWeights.of(tensor, None), activation, output)

    def metrics(self, data: NDArray[np.uint8], alpha: float) -> Metrics:
        """Return the metrics of the tensor with data in its place."""
        kind, x, q = self.tensor.type_name, self.weights, _decoded(self.tensor, data)
        ways = (self.plain, self.activation, self.output)
        stats, by_activation, by_output = (w.compare(kind, self.rows, kind, data, 0) for w in ways)
        error, squares = stats.errors[0].sum_squared_error, stats.sum_squares
        activation_error = self.activation.error(by_activation.errors[0])
        output_error = self.output.error(by_output.errors[0])
        cosine = np.vdot(x, q) / np.sqrt(np.vdot(x, x) * np.vdot(q, q))
        return Metrics(
            nmse=error / squares,
            nrmse=float(np.sqrt(error / squares)),
            negative_sqnr_db=float(10 * np.log10(error / squares)),
            max_error=stats.errors[0].max_error,
            one_minus_cosine=float(1 - cosine),
            squared_error=error,
            n_times_nmse=self.tensor.n_weights * error / squares,
            excess_kurtosis=self.excess_kurtosis,
            activation_nmse=activation_error / self.activation.squares(by_activation),
            activation_error=activation_error,
            output_nmse=output_error / self.output.squares(by_output),
            output_error=output_error,
            alpha_nmse=alpha * error / squares,
        )


def _decoded(tensor: TensorInfo, rows: NDArray[np.uint8]) -> Floats:
    out = np.empty((len(rows), tensor.row_length), np.float32)
    _core.decode(tensor.type_name, rows, out)
    return out.astype(np.float64)
