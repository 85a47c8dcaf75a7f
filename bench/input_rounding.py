"""What llama.cpp's CPU kernels lose by rounding the inputs of quantized weights, by role.

    python bench/input_rounding.py models/smol768-f16.gguf --scales smol768.scales.gguf
    python bench/input_rounding.py --table
    python bench/input_rounding.py models/smol768-f16.gguf --imatrix m.gguf --plans 122.3MB 156.3MB

A model reads tokens of the mix. Each input of a weight is rounded as the kernels round it, to 8
bits by the largest of a block of 32 (Q8_0) or 256 (Q8_K), and to F16. Of Σ(x − x̂)² / Σx², the mean
over tokens is taken; with scales, of the inputs that these leave. Adds a row per weight to
bench/results/input_rounding.jsonl; `--table` prints medians by role, and ranges.

With `--plans`, the model is quantized to these sizes by plans that count this and by plans that do
not, and the KLD of both is compared on the mix's `score` part, window by window
(bench/results/input_rounding_plans.jsonl; `--table` prints these, too).
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

import ramgguf
from paired import Row, add_rows, ratio, read_rows, scored
from provenance import provenance
from ramgguf.gguf.architecture import role_of
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama import ggml
from ramgguf.llama.eval_callback import EvalCallback
from ramgguf.llama.model import LlamaModel
from ramgguf.plan.input_rounding import added_nmse
from ramgguf.quants.scales import Scales, load_scales
from rounded import sequences

RESULTS = Path(__file__).parent / "results" / "input_rounding.jsonl"
PLANS = RESULTS.with_stem("input_rounding_plans")
BLOCKS = (32, 256)
Doubles = NDArray[np.float64]


def rounded(x: Doubles, block: int) -> Doubles:
    """Return rows of inputs, (tokens, columns), rounded to 8 bits by the largest of a block."""
    parts = x.reshape(len(x), -1, block)
    step = np.abs(parts).max(axis=-1, keepdims=True) / 127
    codes = np.divide(parts, step, out=np.zeros_like(parts), where=step > 0)
    found: Doubles = (np.round(codes) * step).reshape(x.shape)
    return found


def relative(x: Doubles, after: Doubles) -> Doubles:
    """Return Σ(x − x̂)² / Σx² of every row; rows of zeros have 0."""
    squares = np.square(x).sum(-1)
    errors = np.square(x - after).sum(-1)
    found: Doubles = np.divide(errors, squares, out=np.zeros_like(squares), where=squares > 0)
    return found


class Inputs(EvalCallback):
    """Sees the inputs of weights, and keeps what rounding makes of them."""

    def __init__(self, scales: Scales | None) -> None:
        super().__init__()
        self._scales = scales
        self.errors: dict[str, dict[str, list[Doubles]]] = {}

    def _sees(self, tensor: Any, *, ask: bool) -> bool:
        node = tensor.contents
        if node.op not in self._multiplications:
            return not ask
        name = node.src[0].contents.name.decode()
        if not ask and name.endswith(".weight") and ggml.is_f32(node.src[1]):
            n_columns = node.src[0].contents.ne[0]
            x = ggml.read_array(node.src[1], np.float32).reshape(-1, n_columns).astype(np.float64)
            scale = None if self._scales is None else self._scales.of_inputs(name)
            if scale is not None and scale.ndim == 1:
                x = x / scale
            found = self.errors.setdefault(name, {})
            for block in BLOCKS:
                if n_columns % block == 0:
                    found.setdefault(str(block), []).append(relative(x, rounded(x, block)))
            half = x.astype(np.float16).astype(np.float64)
            found.setdefault("F16", []).append(relative(x, half))
        return True


def rows(path: Path, scales: Path | None, n_sequences: int, n_ctx: int) -> Iterator[Row]:
    """Yield a row for each weight."""
    watch = Inputs(None if scales is None else load_scales(scales))
    with open_gguf(path) as file:
        tied, arch = file.has_tied_embedding, file.architecture or ""
        tokens = [ids[:n_ctx] for ids in sequences(file, n_sequences)]
    with LlamaModel(
        path, n_ctx=n_ctx, n_threads=1, safe_kernels=True, eval_callback=watch.callback
    ) as model:
        for ids in tokens:
            model.clear()
            for start, end in model.chunks(len(ids)):
                model.decode(ids[start:end])
            watch.raise_failure()
    for name, errors in watch.errors.items():
        yield {
            "model": path.stem,
            "is_scaled": scales is not None,
            "name": name,
            "role": role_of(name, arch, tied=tied),
            "error": {k: float(f"{np.concatenate(v).mean():.4g}") for k, v in errors.items()},
            "n_tokens": n_sequences * n_ctx,
            **provenance(),
        }


def plans(source: Path, options: argparse.Namespace) -> list[Row]:
    """Return a row for each size, with and without what rounding inputs comes to."""
    files: list[tuple[Row, Path]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        for size in options.plans:
            for counts in (False, True):
                out = Path(name) / f"{size}-{counts}.gguf"
                added = added_nmse if counts else lambda *_: 0.0
                with patch("ramgguf.plan.objectives.added_nmse", added):
                    made = ramgguf.quantize(
                        source, size, out, effort="fast", encoder="search", verify=False,
                        imatrix=options.imatrix, scales=options.scales,
                    )  # fmt: skip
                row: Row = {
                    "model": source.stem,
                    "size": size,
                    "counts": counts,
                    "n_bytes": made.n_bytes,
                    "is_scaled": options.scales is not None,
                }
                files.append((row, out))
        return scored(
            files, source, n_ctx=512, rounds=options.rounds, logits=Path(name) / "logits",
            part="score",
        )  # fmt: skip


def plan_table(path: Path) -> Iterator[str]:
    """Yield a Markdown table: KLD without, and the ratio with what rounding inputs comes to."""
    found = read_rows(path, "model", "size", "counts")
    yield "\n| | without, nats | with, ratio |\n|---|---|---|"
    for row in found:
        if not row["counts"]:
            other = next(
                r for r in found if (r["model"], r["size"]) == (row["model"], row["size"])
                and r["counts"]
            )  # fmt: skip
            cells = f"{np.mean(row['kld']):.4f} | {ratio(other, row)}"
            yield f"| {row['model']}, {row['n_bytes'] / 1e6:.1f} MB | {cells} |"


def table(path: Path) -> Iterator[str]:
    """Yield a Markdown table: median (least to largest) of each role and model."""
    found = read_rows(path, "model", "is_scaled", "name")
    models = list(dict.fromkeys((r["model"], r["is_scaled"]) for r in found))
    for kind in (*map(str, BLOCKS), "F16"):
        heads = (f"{m.removesuffix('-f16')}{', scaled' * s}" for m, s in models)
        yield f"\n| {kind} | {' | '.join(heads)} |"
        yield "|---" * (len(models) + 1) + "|"
        for role in dict.fromkeys(r["role"] for r in found):
            cells = []
            for key in models:
                values = [
                    r["error"][kind]
                    for r in found
                    if (r["model"], r["is_scaled"], r["role"]) == (*key, role)
                    and kind in r["error"]
                ]
                low, mid, high = np.quantile(values or [0], (0, 0.5, 1))
                cells.append(f"{mid:.1e} ({low:.1e}–{high:.1e})" if values else "")
            yield f"| {role} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--scales", type=Path)
    parser.add_argument("--sequences", type=int, default=5)
    parser.add_argument("--n-ctx", type=int, default=128)
    parser.add_argument("--plans", nargs="+", help="sizes of files to compare")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--rounds", type=int, default=2, help="windows per domain")
    parser.add_argument("--scratch", type=Path, help="folder for files")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if not options.table:
        if options.model is None:
            parser.error("name a model")
        if options.plans:
            add_rows(PLANS, plans(options.model, options))
        else:
            found = rows(options.model, options.scales, options.sequences, options.n_ctx)
            add_rows(RESULTS, list(found))
    if RESULTS.exists():
        print("\n".join(table(RESULTS)))
    if PLANS.exists():
        print("\n".join(plan_table(PLANS)))


if __name__ == "__main__":
    main()
