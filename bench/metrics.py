"""Which per-tensor metric tells how much the model suffers, and which one chooses the best plan?

    python bench/metrics.py read models/smol768-f16.gguf --imatrix I.gguf --hessian H.gguf \
        --sensitivity S.json
    python bench/metrics.py choose models/smol768-f16.gguf
    python bench/metrics.py correlate

`read` quantizes every matrix alone to each of four formats (`rtn`), decodes it into a loaded copy
of the model, and takes the KLD that it causes on windows of WikiText-2, beside what can be said of
it without running the model on; a line per tensor and format goes to
bench/results/metrics_tensors.jsonl, and what is there is not done again. α of the sensitivity comes
from other tokens. `choose` minimises the sum of each metric over the same formats at equal bytes
and takes the KLD of the whole plan, weights decoded, on other windows; `correlate` ranks, and tells
how linear KLD is in NMSE from format to format. Both append to bench/results/metrics.jsonl.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, kendalltau, spearmanr

from provenance import provenance
from ramgguf.gguf.reader import GGUFFile, TensorInfo, open_gguf
from ramgguf.llama.patched_model import PatchedModel
from ramgguf.llama.patched_weights import PatchedWeights
from ramgguf.llama.token_statistics import standard_error
from ramgguf.plan.knapsack import Choice, solve
from ramgguf.quants import formats
from ramgguf.quants.encoders import EncoderName
from ramgguf.quants.imatrix import load_imatrix
from ramgguf.quants.roundtrip import simulated
from ramgguf.sensitivity.result import Sensitivity
from tensor_metrics import Metrics, Original
from windows import Text

Floats = NDArray[np.float64]

RESULTS = Path(__file__).parent / "results"
TENSORS, OUT = RESULTS / "metrics_tensors.jsonl", RESULTS / "metrics.jsonl"
FORMATS = ("Q2_K", "Q3_K", "Q4_K", "Q6_K")  # rows of smol135 take others: --formats Q4_0 …
SHARES = (0.15, 0.4)  # of the way from the smallest plan to the largest
ENCODER: EncoderName = "rtn"
FIRST = {"read": 3000, "choose": 4000}  # numbers of windows

NAMES = tuple(Metrics.__dataclass_fields__)


def readings() -> list[dict[str, Any]]:
    """Return the lines of tensors that are there."""
    text = TENSORS.read_text() if TENSORS.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read(arguments: argparse.Namespace, file: GGUFFile, probe: PatchedModel) -> None:
    """Append the KLD and the metrics of every tensor in every format."""
    model = arguments.source.stem
    done = {(r["model"], r["tensor"], r["format"]) for r in readings()}
    imatrix = load_imatrix(arguments.imatrix, arguments.hessian)
    known = Sensitivity.load(arguments.sensitivity).tensors
    alphas = {t.name: t.alpha for t in known if t.reading is not None}
    text = Text.of(probe, arguments.n_seq, FIRST["read"])
    with TENSORS.open("a") as out:
        original: Original | None = None
        for name, format_name in ((n, f) for n in alphas for f in arguments.formats):
            if (model, name, format_name) in done:
                continue
            tensor = file.tensor(name)
            if original is None or original.tensor.name != name:
                original = Original.of(file, tensor, imatrix)
            kept = probe.stored_as(tensor.name)
            data, _ = simulated(file, tensor, format_name, encoder=ENCODER, store_as=kept)
            with probe.replaced(tensor, data):
                kld = text.divergence(probe)
            found = original.metrics(data, alphas[name])
            row = {
                "model": model,
                "tensor": name,
                "format": format_name,
                "kld": float(f"{kld.mean():.6g}"),
                "error": float(f"{standard_error(kld):.3g}"),
                "n_tokens": len(kld),
                **{key: float(f"{value:.6g}") for key, value in asdict(found).items()},
            }
            out.write(json.dumps(row) + "\n")
            out.flush()


def choose(arguments: argparse.Namespace, file: GGUFFile, probe: PatchedModel) -> None:
    """Append the KLD of the plans that minimise each metric's sum."""
    rows = [r for r in readings() if r["model"] == arguments.source.stem]
    of_tensor = {n: list(g) for n, g in groupby(rows, key=lambda r: str(r["tensor"]))}
    text = Text.of(probe, arguments.n_seq, FIRST["choose"])
    weights = PatchedWeights(file, probe, ENCODER, None, 1)
    tensors = [file.tensor(name) for name in of_tensor]
    sizes = [[_bytes(t, r["format"]) for r in of_tensor[t.name]] for t in tensors]
    smallest, largest = sum(map(min, sizes)), sum(map(max, sizes))
    for share in SHARES:
        budget = int(smallest + share * (largest - smallest))
        for metric in (*(n for n in NAMES if n != "excess_kurtosis"), "kld"):
            chosen = plan(tensors, of_tensor, metric, budget)
            for name, format_name in chosen.items():
                weights.put(name, format_name)
            kld = text.divergence(probe)
            add(
                part="choose",
                metric=metric,
                model=arguments.source.stem,
                share=share,
                n_bytes=sum(_bytes(t, chosen[t.name]) for t in tensors),
                kld=float(kld.mean()),
                error=standard_error(kld),
                n_tokens=len(kld),
            )


def plan(
    tensors: Sequence[TensorInfo],
    of_tensor: dict[str, list[dict[str, Any]]],
    metric: str,
    n_bytes: int,
) -> dict[str, str]:
    """Return the formats that minimise the metric's sum; costs start at each tensor's least."""
    items = []
    for tensor in tensors:
        values = [float(r[metric]) for r in of_tensor[tensor.name]]
        names = [r["format"] for r in of_tensor[tensor.name]]
        least = min(values)
        items.append(
            [Choice(_bytes(tensor, f), v - least) for f, v in zip(names, values, strict=True)]
        )
    solution = solve(items, n_bytes)
    return {
        t.name: of_tensor[t.name][k]["format"]
        for t, k in zip(tensors, solution.chosen, strict=True)
    }


def _bytes(tensor: TensorInfo, format_name: str) -> int:
    return formats.row_bytes(format_name, tensor.row_length) * tensor.n_rows


def correlate() -> None:
    """Append each metric's rank correlation with KLD over the tensors inside layers, by format."""
    rows = [r for r in readings() if r["tensor"].startswith("blk.") and r["kld"] > 0]
    kinds = sorted({(r["model"], r["format"]) for r in rows})
    for model, format_name in kinds:
        group = [r for r in rows if (r["model"], r["format"]) == (model, format_name)]
        kld = np.array([r["kld"] for r in group])
        for metric in NAMES:
            values = np.array([r[metric] for r in group])
            add(
                part="correlate",
                metric=metric,
                model=model,
                format=format_name,
                n_tensors=len(group),
                **dict(correlations(values, kld)),
            )


def linearity() -> None:
    """Append how KLD grows with NMSE from format to format, tensor by tensor.

    slope is that of log KLD over log NMSE; α by a format is given in units of Q4_K's, or of the
    first format's where there is no Q4_K.
    """
    by_tensor: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for r in readings():
        if r["kld"] > 0:
            by_tensor.setdefault((r["model"], r["tensor"]), {})[r["format"]] = r
    for model in sorted({model for model, _ in by_tensor}):
        own = [v for (m, _), v in by_tensor.items() if m == model]
        names = list(dict.fromkeys(f for v in own for f in v))
        found = [v for v in own if len(v) == len(names)]
        logs = np.log([[[v[f]["nmse"], v[f]["kld"]] for f in names] for v in found])
        slopes = np.array([np.polyfit(x[:, 0], x[:, 1], 1)[0] for x in logs])
        add(part="linearity", model=model, n_tensors=len(found), slope=_quantiles(slopes))
        alphas = np.exp(logs[:, :, 1] - logs[:, :, 0])
        unit = "Q4_K" if "Q4_K" in names else names[0]
        for k, name in enumerate(names):
            ratio = _quantiles(alphas[:, k] / alphas[:, names.index(unit)])
            add(part="linearity", model=model, format=name, **{f"alpha_of_{unit.lower()}": ratio})


def _quantiles(values: Floats) -> dict[str, float]:
    names = ("p5", "p25", "median", "p75", "p95")
    found = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
    return {n: round(float(v), 3) for n, v in zip(names, found, strict=True)}


def correlations(values: Floats, kld: Floats) -> Iterator[tuple[str, float]]:
    """Yield Spearman's and Kendall's correlation, and the 95 % interval of the first."""
    yield "spearman", float(spearmanr(values, kld).statistic)
    yield "kendall", float(kendalltau(values, kld).statistic)
    drawn = bootstrap(
        (values, kld), lambda a, b: spearmanr(a, b).statistic, paired=True, vectorized=False,
        n_resamples=1000, method="percentile", random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    yield "spearman_low", float(drawn.low)
    yield "spearman_high", float(drawn.high)


def add(**values: object) -> None:
    print(json.dumps(values), flush=True)
    with OUT.open("a") as out:
        out.write(json.dumps({**values, **provenance()}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["read", "choose", "correlate"])
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--sensitivity", type=Path)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--hessian", type=Path)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--n-seq", type=int, default=1)
    parser.add_argument("--n-ctx", type=int, default=256)
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "correlate":
        correlate()
        linearity()
        return
    with (
        open_gguf(arguments.source) as file,
        tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch,
        PatchedModel(file, Path(scratch), n_ctx=arguments.n_ctx, n_threads=1) as probe,
    ):
        if arguments.part == "read":
            read(arguments, file, probe)
        else:
            choose(arguments, file, probe)


if __name__ == "__main__":
    main()
