"""Which per-tensor metric tells how much the model suffers: rank correlations with measured KLD.

    python bench/metrics.py models/smol768-f16.gguf s1.json --imatrix I.gguf --hessian H.gguf

Takes the readings of a sensitivity file: every tensor quantized alone, with the KLD it causes. The
same quantization is made again and measured by each metric. Appends a line per metric to
bench/results/metrics.jsonl.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, kendalltau, spearmanr

from provenance import provenance
from ramgguf import _core
from ramgguf.gguf_io import GGUFFile, TensorInfo, open_gguf
from ramgguf.imatrix import Imatrix, load_imatrix
from ramgguf.sensitivities import Reading, Sensitivity
from ramgguf.simulation import simulated
from ramgguf.weighing import Scale

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """What can be said of one tensor's quantization without running the model on."""

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


def measured(
    file: GGUFFile, tensor: TensorInfo, reading: Reading, encoder: str, imatrix: Imatrix
) -> Metrics:
    """Return the metrics of the quantization that the reading is of."""
    rows = file.read_rows(tensor, 0, tensor.n_rows)
    plain, output = Scale.of(tensor, None), Scale.of(tensor, imatrix)
    weighed = Scale(output.importance, output.rows_per_expert)
    data, _ = simulated(file, tensor, reading.format, encoder=encoder)
    kind = tensor.type_name
    stats = plain.compare(kind, rows, kind, data, 0)
    error, squares = stats.errors[0].sum_squared_error, stats.sum_squares
    x, q = _decoded(tensor, rows), _decoded(tensor, data)
    centred = x - x.mean()
    by_activation = weighed.compare(kind, rows, kind, data, 0)
    by_output = output.compare(kind, rows, kind, data, 0)
    return Metrics(
        nmse=error / squares,
        nrmse=float(np.sqrt(error / squares)),
        negative_sqnr_db=float(10 * np.log10(error / squares)),
        max_error=stats.errors[0].max_error,
        one_minus_cosine=float(1 - (x * q).sum() / np.sqrt((x * x).sum() * (q * q).sum())),
        squared_error=error,
        n_times_nmse=tensor.n_weights * error / squares,
        excess_kurtosis=float(np.mean(centred**4) / np.mean(centred**2) ** 2 - 3),
        activation_nmse=weighed.error(by_activation.errors[0]) / weighed.squares(by_activation),
        activation_error=weighed.error(by_activation.errors[0]),
        output_nmse=output.error(by_output.errors[0]) / output.squares(by_output),
        output_error=output.error(by_output.errors[0]),
    )


def _decoded(tensor: TensorInfo, rows: NDArray[np.uint8]) -> Floats:
    out = np.empty((len(rows), tensor.row_length), np.float32)
    _core.decode(tensor.type_name, rows, out)
    return out.astype(np.float64)


def correlations(name: str, values: Floats, kld: Floats) -> Iterator[tuple[str, float]]:
    """Yield Spearman's and Kendall's correlation, and the interval of the first."""
    yield "spearman", float(spearmanr(values, kld).statistic)
    yield "kendall", float(kendalltau(values, kld).statistic)
    drawn = bootstrap(
        (values, kld), lambda a, b: spearmanr(a, b).statistic, paired=True, vectorized=False,
        n_resamples=1000, method="percentile", random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    yield "spearman_low", float(drawn.low)
    yield "spearman_high", float(drawn.high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("sensitivity", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--hessian", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("bench/results/metrics.jsonl"))
    arguments = parser.parse_args()
    sensitivity = Sensitivity.load(arguments.sensitivity)
    readings = {t.name: t.reading for t in sensitivity.tensors if t.reading and t.reading.kld > 0}
    imatrix = load_imatrix(arguments.imatrix, arguments.hessian)
    with open_gguf(arguments.source) as file:
        found = [
            measured(file, file.tensor(name), reading, sensitivity.encoder, imatrix)
            for name, reading in readings.items()
        ]
    kld = np.array([r.kld for r in readings.values()])
    inside = np.array([name.startswith("blk.") for name in readings])
    with arguments.out.open("a") as out:
        for field in fields(Metrics):
            values = np.array([getattr(m, field.name) for m in found])
            row: dict[str, object] = {
                "metric": field.name,
                "model": arguments.source.name,
                "format": next(iter(readings.values())).format,
                "n_tensors": int(inside.sum()),
                **dict(correlations(field.name, values[inside], kld[inside])),
                **provenance(),
            }
            out.write(json.dumps(row) + "\n")
            print(
                f"| {field.name} | {row['spearman']:.2f} ({row['spearman_low']:.2f} to "
                f"{row['spearman_high']:.2f}) | {row['kendall']:.2f} |"
            )


if __name__ == "__main__":
    main()
