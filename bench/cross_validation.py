"""Priors fitted to the sensitivities of one family, and what their plans cost on the other.

    python bench/cross_validation.py models/smol768-f16.gguf models/qwen05-f16.gguf --folder scratch

bench/results/priors.jsonl has the sensitivities (bench/priors.py). Priors by role, and by role and
depth, are fitted to each model and to both. Every plan is priced by the α of the model that it is
for. With NAME.imatrix.gguf in the folder, the same under that importance matrix, where priors may
also multiply the local output error. Rows of part cross, matrix and fit are added. With
--only-shipped, the shipped priors alone are priced; with --only-output, local output error.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.stats import spearmanr

import ramgguf
from provenance import provenance
from ramgguf.core.errors import BudgetError
from ramgguf.core.progress import Silent
from ramgguf.gguf.architecture import parse_name
from ramgguf.gguf.reader import open_gguf
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan.allocate import allocate
from ramgguf.plan.objectives import Costing
from ramgguf.plan.priors import SHARED_BY_HEADS, ModelShape, prior
from ramgguf.plan.result import Constraints
from ramgguf.quants.imatrix import load_importance
from ramgguf.sensitivity.result import Sensitivity
from ramgguf.sensitivity.reweighing import reweighed

OUT = Path(__file__).parent / "results" / "priors.jsonl"
SIZES = (3.5, 4.5, 5.5, 6.5)
N_THREADS = 2
ENDS = 4  # layers with a factor of their own: first, second, last but one, last

Kind = Literal["roles", "roles and ends", "roles and ends, none less", "roles and depth"]
KINDS: tuple[Kind, ...] = (
    "roles",
    "roles and ends",
    "roles and ends, none less",
    "roles and depth",
)


@dataclass(frozen=True)
class Model:
    """A model's curves and its α: under no importance matrix, or under one."""

    name: str
    measurement: Measurement
    alpha: Mapping[str, float]
    read: frozenset[str]  # tensors whose α was read, not interpolated

    @property
    def shape(self) -> ModelShape:
        return ModelShape.of(self.measurement)

    def tensors(self) -> list[TensorMeasurement]:
        return [t for t in self.measurement.tensors if t.kept is None and self.alpha.get(t.name)]

    def read_tensors(self) -> list[TensorMeasurement]:
        return [t for t in self.tensors() if t.name in self.read]

    def size(self, tensor: TensorMeasurement, unit: str) -> float:
        """Return what a prior multiplies: the tensor's weights, or its mean squared output."""
        if unit == "weights":
            return tensor.n_weights
        if tensor.output_squares is None:  # looked up: its output's error is a row's
            return tensor.sum_squares * tensor.row_length / tensor.n_weights
        return tensor.output_squares


@dataclass(frozen=True)
class Fit:
    """The logarithm of a role's prior, and of its factor at the ends or along the depth."""

    roles: Mapping[str, float]
    depth: Mapping[str, tuple[float, ...]]
    kind: Kind

    def log(self, tensor: TensorMeasurement, shape: ModelShape) -> float:
        part, sharing = part_and_sharing(tensor, shape)
        return (
            self.roles.get(part, 0.0)
            + sharing
            + self.factor(part, tensor.layer, shape.n_layers or 1)
        )

    def factor(self, part: str, layer: int | None, n_layers: int) -> float:
        place = bin_of(layer, n_layers, self.kind)
        return 0.0 if place is None or part not in self.depth else self.depth[part][place]


def part_and_sharing(tensor: TensorMeasurement, shape: ModelShape) -> tuple[str, float]:
    """Return the tensor's part, and the logarithm of the query heads that share each weight.

    A tied embedding counts as a head.
    """
    part = parse_name(tensor.name).part
    if part == "output" or (shape.tied and part == "token_embd"):
        part = "head"
    return part, math.log(shape.heads_per_kv) if part in SHARED_BY_HEADS else 0.0


def bin_of(layer: int | None, n_layers: int, kind: Kind) -> int | None:
    """Return which factor a layer has; None for those that the role's prior is of."""
    if layer is None or kind == "roles":
        return None
    end = {0: 0, 1: 1, n_layers - 2: 2, n_layers - 1: 3}.get(layer)
    if end is not None or kind != "roles and depth":
        return end
    return ENDS + min(2, 3 * (layer - 2) // max(1, n_layers - ENDS))


def fit(model: Model, kind: Kind, unit: str) -> Fit:
    """Return the medians of log α per unit by role, and of what is left by place."""
    shape = model.shape
    left: dict[str, list[tuple[int | None, float]]] = {}
    for t in model.read_tensors():
        part, sharing = part_and_sharing(t, shape)
        value = math.log(model.alpha[t.name] / model.size(t, unit)) - sharing
        left.setdefault(part, []).append((bin_of(t.layer, shape.n_layers or 1, kind), value))
    zero = np.median([v for _, v in left["attn_q"]])
    roles = {part: float(np.median([v for _, v in values]) - zero) for part, values in left.items()}
    depth = {}
    for part, values in left.items():
        n_bins = 0 if kind == "roles" else ENDS + 3 * (kind == "roles and depth")
        medians = []
        for place in range(n_bins):
            here = [v - zero - roles[part] for p, v in values if p == place]
            medians.append(float(np.median(here)) if here else 0.0)
        if kind == "roles and ends, none less":
            medians = [max(0.0, m) for m in medians]
        depth[part] = tuple(medians)
    return Fit(roles, depth, kind)


def pooled(a: Fit, b: Fit) -> Fit:
    """Return the geometric mean of two fits."""
    return Fit(
        {
            p: (a.roles.get(p, b.roles.get(p, 0.0)) + b.roles.get(p, a.roles.get(p, 0.0))) / 2
            for p in {**a.roles, **b.roles}
        },
        {
            p: tuple((x + y) / 2 for x, y in zip(a.depth[p], b.depth[p], strict=True))
            for p in a.depth.keys() & b.depth.keys()
        },
        a.kind,
    )


def predicted(
    model: Model, budget: int, cost: Callable[[TensorMeasurement, Point], float]
) -> float:
    """Return Σ α · NMSE of the plan that minimises the cost."""
    plan = allocate(
        model.measurement, budget, costing=Costing("bench", cost), constraints=Constraints()
    )
    return math.fsum(model.alpha.get(a.name, 0.0) * a.nmse for a in plan.assignments)


def score(
    model: Model,
    log_prior: Mapping[str, float],
    unit: str = "weights",
    error: Callable[[Point], float] = lambda p: p.nmse,
) -> dict[str, object]:
    """Return how a prior ranks the model's tensors, and what its plans cost beyond the best."""
    sizes = {t.name: model.size(t, unit) for t in model.tensors()}
    read = model.read_tensors()
    truth = np.log([model.alpha[t.name] / sizes[t.name] for t in read])
    guess = np.array([log_prior[t.name] for t in read])
    ratio = truth - guess
    excess = {}
    for bpw in SIZES:
        n_bytes = model.measurement.n_overhead_bytes + int(bpw * model.measurement.n_weights / 8)
        try:
            best = predicted(model, n_bytes, lambda t, p: model.alpha.get(t.name, 0.0) * p.nmse)
            found = predicted(
                model,
                n_bytes,
                lambda t, p: (
                    math.exp(log_prior.get(t.name, 0.0))
                    * sizes.get(t.name, float(t.n_weights))
                    * error(p)
                ),
            )
        except BudgetError:
            continue
        excess[str(bpw)] = round(found / best - 1, 4)
    return {
        "spearman": round(float(spearmanr(truth, guess).statistic), 3) if np.ptp(guess) else 0.0,
        "log_spread": round(float(np.std(ratio)), 3),
        "excess": excess,
    }


def compare(
    models: list[Model],
    part: str,
    unit: str,
    shipped: str,
    add: Callable[..., None],
    kinds: tuple[Kind, ...] = KINDS,
) -> None:
    """Add what priors by every kind of fit cost on each model, whichever they were fitted on.

    shipped is what rows call the priors of the package.
    """
    for kind in kinds:
        fits = {m.name: fit(m, kind, unit) for m in models}
        fits["both"] = pooled(*(fits[m.name] for m in models))
        for on, found in fits.items():
            for m in models:
                logs = {t.name: found.log(t, m.shape) for t in m.tensors()}
                add(part, m, f"{kind} × {unit}", on, score(m, logs, unit))
            values = {p: round(math.exp(v), 3) for p, v in found.roles.items()}
            ends = {p: [round(math.exp(x), 2) for x in d] for p, d in found.depth.items() if d}
            add("fit", None, f"{kind} × {unit} ({part})", on, {"roles": values, "depth": ends})
    for m in models:
        today = {t.name: math.log(prior(t, m.shape)) for t in m.tensors()}
        one = dict.fromkeys(today, 0.0)
        if unit == "output":
            add(part, m, "1 × output", "none", score(m, one, unit))
            continue
        add(part, m, f"{shipped} × weights", shipped, score(m, today))
        add(part, m, "1 × weights", "none", score(m, one))
        if part == "matrix":
            plain = score(m, today, error=lambda p: p.unweighted)
            add(part, m, f"{shipped} × weights, errors unweighted", shipped, plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs=2)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shipped-as", default="shipped")
    parser.add_argument("--only-shipped", action="store_true")
    parser.add_argument("--only-output", action="store_true")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []

    def add(
        part: str, model: Model | None, prior_: str, on: str, found: Mapping[str, object]
    ) -> None:
        tested = {} if model is None else {"tested_on": model.name}
        row = {"bench": "priors", "part": part, "prior": prior_, "fitted_on": on, **tested, **found}
        print(json.dumps(row), flush=True)
        rows.append(row)

    plain, under_matrix = [], []
    for path in arguments.models:
        name = path.stem.removesuffix("-f16")
        found = Sensitivity.load(arguments.folder / f"{name}.sens.json")
        kept_curves = arguments.folder / f"{name}.rd.json"
        if kept_curves.exists():
            curves = Measurement.load(kept_curves)
        else:
            curves = ramgguf.measure(path, encoder=found.encoder, threads=N_THREADS)
            curves.save(kept_curves)
        read = frozenset(t.name for t in found.tensors if t.origin == "measured")
        plain.append(Model(name, curves, {t.name: t.alpha for t in found.tensors}, read))
        matrix = arguments.folder / f"{name}.imatrix.gguf"
        if arguments.only_shipped or not matrix.exists():
            continue
        curves = ramgguf.measure(path, encoder=found.encoder, imatrix=matrix, threads=N_THREADS)
        with open_gguf(path) as file:
            imatrix = load_importance(matrix, None, found.encoder)
            weighed = reweighed(file, found, imatrix, Silent())
        weighed_alpha = {t.name: t.alpha for t in weighed.tensors}
        under_matrix.append(Model(name, curves, weighed_alpha, read))
    shipped = arguments.shipped_as
    kinds = () if arguments.only_shipped else KINDS
    if not arguments.only_output:
        compare(plain, "cross", "weights", shipped, add, kinds)
    if len(under_matrix) == len(plain):
        if not arguments.only_output:
            compare(under_matrix, "matrix", "weights", shipped, add, kinds)
        compare(under_matrix, "matrix", "output", shipped, add, kinds)
    kept = OUT.read_text().splitlines()
    lines = [json.dumps({**row, **(provenance() if i == 0 else {})}) for i, row in enumerate(rows)]
    OUT.write_text("\n".join([*kept, *lines]) + "\n")


if __name__ == "__main__":
    main()
