"""What sensitivities are worth: do tokens matter, are they linear, do they predict whole plans?

    python bench/sensitivity_report.py tokens self.json random.json text.json
    python bench/sensitivity_report.py enough models/smol768-f16.gguf best.json fewer.json …
    python bench/sensitivity_report.py linearity models/smol768-f16.gguf self.json
    python bench/sensitivity_report.py plans models/smol768-f16.gguf self.json
    python bench/sensitivity_report.py kernels models/smol768-f16.gguf self.json

tokens compares files of `ramgguf sensitivity` (or the journals of runs under way). enough plans
with each file and prices the plans by the first one's α: what fewer tokens cost. linearity reads
some tensors in every format, plans runs whole plans of random and of real sensitivities, weights
decoded to the source's type; kernels runs uniform files as they are, with what their kernels add.
All tokens are WikiText-2's. Rows go to bench/results/sensitivity.jsonl one by one; what is there
is not done again.
"""

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from scipy.stats import spearmanr

import ramgguf
from contenders import plan_by_alpha
from provenance import provenance
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama.model import LlamaModel, Logits
from ramgguf.llama.patched_model import PatchedModel
from ramgguf.llama.patched_weights import PatchedWeights
from ramgguf.llama.token_statistics import standard_error
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan
from ramgguf.quants import formats
from ramgguf.quants.roundtrip import simulated
from ramgguf.sensitivity.journal import Journal
from ramgguf.sensitivity.result import Reading, Sensitivity
from windows import Text

OUT = Path(__file__).parent / "results" / "sensitivity.jsonl"
N_CTX, N_THREADS = 512, 1
FIRST = 2000  # number of the first window
LINEARITY_TENSORS = (
    "token_embd.weight",
    "blk.0.ffn_down.weight",
    "blk.3.attn_v.weight",
    "blk.11.ffn_down.weight",
    "blk.15.attn_q.weight",
    "blk.15.ffn_up.weight",
    "blk.20.attn_output.weight",
    "blk.29.ffn_down.weight",
)
BUDGETS_BPW = (3.6, 4.0, 4.4, 5.0, 5.8, 6.6)

Floats = NDArray[np.float64]


def rows() -> list[dict[str, object]]:
    """Return the whole rows of the results file."""
    text = OUT.read_text() if OUT.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def done(part: str, name: str) -> bool:
    return any((r["part"], r["name"]) == (part, name) for r in rows())


def add(part: str, name: str, **values: object) -> None:
    row = {"bench": "sensitivity_report", "part": part, "name": name, **values}
    print(json.dumps(row), flush=True)
    with OUT.open("a") as out:
        out.write(json.dumps({**row, **provenance()}) + "\n")


def readings(path: Path) -> dict[str, Reading]:
    """Return the readings of a sensitivity, or of a journal."""
    if path.suffix == ".json":
        found = Sensitivity.load(path).tensors
        return {t.name: t.reading for t in found if t.reading is not None}
    with Journal(path) as journal:
        return dict(journal.readings)


def compare_tokens(paths: list[Path]) -> None:
    """Add how α of each two files correlates over the tensors that both have, and how it is off."""
    for a, b in itertools.combinations(paths, 2):
        name = f"{a.name.split('.')[0]} – {b.name.split('.')[0]}"
        if done("tokens", name):
            continue
        of_a, of_b = readings(a), readings(b)
        names = [n for n in of_a if n in of_b and of_a[n].kld > 0 and of_b[n].kld > 0]
        x = np.log([of_a[n].alpha for n in names])
        y = np.log([of_b[n].alpha for n in names])
        noise = np.array([r.standard_error / r.kld for n in names for r in (of_a[n], of_b[n])])
        difference = y - x
        add(
            "tokens",
            name,
            n_tensors=len(names),
            spearman=round(float(spearmanr(x, y).statistic), 4),
            median_ratio=round(float(np.exp(np.median(difference))), 3),
            log_spread=round(float(np.std(difference - np.median(difference))), 3),
            median_relative_error=round(float(np.median(noise)), 3),
        )


def enough(source: Path, paths: list[Path]) -> None:
    """Add how much more than the best known plan, by the first file's α, plans of the others cost.

    Priors are among them: no tokens at all.
    """
    best, *others = (Sensitivity.load(path) for path in paths)
    measurement = ramgguf.measure(source, encoder=best.encoder, threads=N_THREADS)
    for path, fewer in zip([*paths[1:], Path("priors")], [*others, None], strict=True):
        name = path.name.split(".")[0]
        if done("enough", name):
            continue
        excess = []
        for bpw in BUDGETS_BPW:
            budget = f"{bpw}bpw"
            known = plan_by_alpha(measurement, budget, best)
            plan = plan_by_alpha(measurement, budget, fewer)
            excess.append(predicted(plan, best) / predicted(known, best) - 1)
        add(
            "enough",
            name,
            n_tokens=fewer.tokens.n_tokens if fewer else 0,
            kind=fewer.tokens.kind if fewer else None,
            seconds=fewer.seconds if fewer else 0.0,
            excess_median=round(float(np.median(excess)), 4),
            excess_worst=round(max(excess), 4),
        )


def linearity(file: GGUFFile, probe: PatchedModel, text: Text, sensitivity: Sensitivity) -> None:
    """Add what some tensors do in every format, alone."""
    for name in LINEARITY_TENSORS:
        tensor = file.tensor(name)
        for format_name in formats.quantized():
            if done("linearity", f"{name} {format_name}"):
                continue
            data, nmse = simulated(
                file,
                tensor,
                format_name,
                encoder=sensitivity.encoder,
                store_as=probe.stored_as(name),
            )
            with probe.replaced(tensor, data):
                kld = text.divergence(probe)
            add(
                "linearity",
                f"{name} {format_name}",
                nmse=nmse,
                kld=float(kld.mean()),
                error=standard_error(kld),
            )


def whole_plans(measurement: Measurement, sensitivity: Sensitivity) -> Iterator[tuple[str, Plan]]:
    """Yield plans of many sizes: by sensitivity, priors, error alone, and blindly."""
    for k, bpw in enumerate(BUDGETS_BPW):
        budget = f"{bpw}bpw"
        known = plan_by_alpha(measurement, budget, sensitivity)
        yield f"sensitivity {budget}", known
        for objective in ("weighted", "nmse"):
            plan = ramgguf.plan(measurement, budget, objective=objective, min_sqnr_db=0)
            yield f"{objective} {budget}", plan
        rng = np.random.default_rng(k)
        drawn = tuple(
            t.model_copy(update={"alpha": t.n_weights * math.exp(rng.normal(0, 1.5))})
            for t in sensitivity.tensors
        )
        blind = sensitivity.model_copy(update={"tensors": drawn})
        plan = plan_by_alpha(measurement, budget, blind)
        yield f"random {budget}", plan


def predicted(plan: Plan, sensitivity: Sensitivity) -> float:
    alpha = {t.name: t.alpha for t in sensitivity.tensors}
    return math.fsum(alpha.get(a.name, 0.0) * a.nmse for a in plan.assignments)


def run_plans(file: GGUFFile, probe: PatchedModel, text: Text, sensitivity: Sensitivity) -> None:
    """Add the KLD of whole plans, weights decoded, beside Σ α · NMSE."""
    measurement = ramgguf.measure(file.paths[0], encoder=sensitivity.encoder, threads=N_THREADS)
    weights = PatchedWeights(file, probe, sensitivity.encoder, None, N_THREADS)
    for name, plan in whole_plans(measurement, sensitivity):
        if done("plans", name):
            continue
        for a in plan.assignments:
            weights.put(a.name, a.format)
        kld = text.divergence(probe)
        add(
            "plans",
            name,
            n_bytes=plan.n_bytes,
            predicted=predicted(plan, sensitivity),
            kld=float(kld.mean()),
            error=standard_error(kld),
        )


def run_kernels(source: Path, text: Text, sensitivity: Sensitivity, folder: Path) -> None:
    """Add the KLD of files uniform in a format through its kernels, beside Σ α · NMSE."""
    measurement = ramgguf.measure(source, encoder=sensitivity.encoder, threads=N_THREADS)
    for format_name in formats.quantized():
        if done("kernels", format_name):
            continue
        plan = ramgguf.plan(measurement, "1000%", pins=[f".={format_name}"])
        path = folder / "uniform.gguf"
        ramgguf.quantize(source, from_plan=plan, output=path, force=True, verify=False)
        with LlamaModel(path, n_ctx=N_CTX, n_threads=N_THREADS, safe_kernels=True) as model:
            kld = np.concatenate(
                [
                    _divergence(model, ids, logits)
                    for ids, logits in zip(text.sequences, text.reference, strict=True)
                ]
            )
        path.unlink()
        add(
            "kernels",
            format_name,
            n_bytes=plan.n_bytes,
            predicted=predicted(plan, sensitivity),
            kld=float(kld.mean()),
            error=standard_error(kld),
        )


def _divergence(model: LlamaModel, ids: NDArray[np.int32], reference: Logits) -> Floats:
    model.clear()
    found = []
    for start, end in model.chunks(len(ids)):
        q = log_softmax(model.decode(ids[start:end]).astype(np.float64), axis=1)
        p = log_softmax(reference[start:end].astype(np.float64), axis=1)
        found.append((np.exp(p) * (p - q)).sum(axis=1))
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["tokens", "enough", "linearity", "plans", "kernels"])
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--n-seq", type=int, default=1)
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "tokens":
        compare_tokens(arguments.files)
        return
    if arguments.part == "enough":
        enough(arguments.files[0], arguments.files[1:])
        return
    source, sensitivity = arguments.files[0], Sensitivity.load(arguments.files[1])
    with (
        open_gguf(source) as file,
        tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch,
        PatchedModel(file, Path(scratch), n_ctx=N_CTX, n_threads=N_THREADS) as probe,
    ):
        text = Text.of(probe, arguments.n_seq, FIRST)
        if arguments.part == "linearity":
            linearity(file, probe, text, sensitivity)
        elif arguments.part == "plans":
            run_plans(file, probe, text, sensitivity)
        else:
            run_kernels(source, text, sensitivity, Path(scratch))


if __name__ == "__main__":
    main()
