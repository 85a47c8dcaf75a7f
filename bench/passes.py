"""Forward passes: tokens/s of drawing by sequences at a time and stand-in, capture, and its worth.

    python bench/passes.py rates models/smol768-f16.gguf
    python bench/passes.py capture models/smol768-f16.gguf
    python bench/passes.py quality models/smol768-f16.gguf --sizes 3.5bpw 4.5bpw
    python bench/passes.py --calculate

rates: the first steps of drawing, 8, 64 or 128 sequences at a time, on the model and its stand-ins.
capture: the same few tokens drawn and captured as one pass (64 at a time, XᵀX from 256 rows up),
and in two passes (8 at a time, a draw in Python for each, XᵀX after each chunk, the head computed).
quality: files of equal bytes made with importance matrices (with --encoder gptq Hessians, with
--alpha sensitivities, too) from the model and from its stand-ins; their mean KLD on WikiText-2,
resampled together, and the seconds that the statistics took.
--calculate: no runs, a table of what larger models would take on more cores, calculated from the
measured rates in bench/results/passes.jsonl.

Variants take turns, --rounds times. With --threads 1, seconds are CPU time of the process, which
other work on the machine changes little; with more, threads wait for each other by spinning, and
seconds are those of the clock. Appends a line per variant to bench/results/passes.jsonl.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ramgguf
from alpha_passes import WAYS, share_of
from provenance import provenance
from ramgguf.core.mix import documents
from ramgguf.core.parallel import default_threads
from ramgguf.gguf.architecture import HEAD, TOKEN_EMBEDDING, is_multiplied
from ramgguf.gguf.reader import TensorInfo, open_gguf
from ramgguf.llama import sampling
from ramgguf.llama.capture import Tap
from ramgguf.llama.model import LlamaModel, draw
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.sampling import draw_together
from ramgguf.quants.stand_in import StandIn, write_stand_in
from ramgguf.sensitivity import Sensitivity
from ramgguf.sensitivity.starts import Depth, Starts, TensorPass
from ramgguf.sensitivity.timing import Costs
from scores import kld_ratio, scores

# Weights that a token is multiplied with, of the models that were measured (is_multiplied).
MULTIPLIED = {"smol768-f16.gguf": 188_153_856, "qwen05-f16.gguf": 493_961_216}
DRAWN = 24_576  # tokens of a calibration
ALPHA_TOKENS = 512  # that each matrix's sensitivity is read on
F16_BYTES = 2

RESULTS = Path(__file__).parent / "results" / "passes.jsonl"
TOGETHER = (8, 64, 128)
N_STEPS = {8: 6, 64: 4, 128: 3}  # timed steps: about as long for each
FIRST = 300  # a token to begin with; what is drawn after it depends on the generator alone
BEFORE = 8  # sequences that were drawn at a time before


@contextmanager
def source(model: Path, stand_in: StandIn, threads: int) -> Iterator[tuple[Path, float]]:
    """Yield the file that passes run on, and the seconds that writing it took."""
    with tempfile.TemporaryDirectory() as folder:
        if stand_in == "none":
            yield model, 0.0
            return
        start = time.perf_counter()
        with open_gguf(model) as file:
            path = write_stand_in(file, stand_in.upper(), Path(folder) / "s.gguf", threads=threads)
        yield path, time.perf_counter() - start


def rates(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Return tokens/s of drawing for every stand-in and number of sequences at a time."""
    found: dict[tuple[StandIn, int], list[float]] = {}
    written: dict[StandIn, float] = {}
    for _ in range(arguments.rounds):
        for stand_in in arguments.stand_ins:
            with (
                source(arguments.model, stand_in, arguments.threads) as (path, seconds),
                LlamaModel(
                    path, n_ctx=512, n_threads=arguments.threads, safe_kernels=True
                ) as model,
            ):
                written[stand_in] = seconds
                for n in arguments.together:
                    found.setdefault((stand_in, n), []).append(
                        drawing_rate(model, n, arguments.clock)
                    )
    return [
        {
            "part": "rates",
            "stand_in": stand_in,
            "n_together": n,
            "tokens_per_second": float(np.median(values)),
            "all": values,
            "write_seconds": written[stand_in],
        }
        for (stand_in, n), values in found.items()
    ]


def drawing_rate(model: LlamaModel, n: int, clock: Callable[[], float]) -> float:
    """Return the tokens/s of drawing n sequences, its first step aside: the median of the steps."""
    ends: list[float] = []
    rngs = [np.random.default_rng([0, k]) for k in range(n)]
    draw_together(
        model,
        [FIRST] * n,
        1 + N_STEPS.get(n, 4),
        rngs,
        on_step=lambda: ends.append(clock()),
    )
    return n / float(np.median(np.diff(ends)))


class TapBefore(Tap):
    """The tap as it was: XᵀX is added with each decode, by one thread."""

    def check(self) -> None:
        super().check()
        self._add_grams(1)


def capture(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Return the seconds of drawing and capturing so many tokens, in one pass and in two."""
    n, length = arguments.sequences, arguments.tokens
    with open_gguf(arguments.model) as file:
        tied = file.has_tied_embedding
        names = [
            t.name
            for t in file.tensors
            if is_multiplied(t.name, t.shape, file.architecture, tied=tied)
        ]
        head = TOKEN_EMBEDDING if tied else HEAD
    seconds: dict[tuple[str, bool], list[dict[str, float]]] = {}
    owners: set[str] = set()
    for number in range(arguments.rounds):
        for with_grams in (False, True):
            for way in (one_pass, two_passes):
                if number == 0 and not owners:
                    owners = owners_of(arguments.model, names)
                grams = owners if with_grams else set[str]()
                took = way(arguments, names, grams, head)
                seconds.setdefault((way.__name__, with_grams), []).append(took)
    return [
        {
            "part": "capture",
            "way": way,
            "with_hessians": with_grams,
            "n_sequences": n,
            "n_tokens": length,
            "seconds": {key: float(np.median([took[key] for took in all_])) for key in all_[0]},
            "all": all_,
        }
        for (way, with_grams), all_ in seconds.items()
    ]


def owners_of(path: Path, names: list[str]) -> set[str]:
    """Return the weights under which inputs are kept."""
    tap = Tap(names)
    with LlamaModel(
        path, n_ctx=64, n_threads=1, safe_kernels=True, eval_callback=tap.callback
    ) as model:
        model.decode(np.array([FIRST, FIRST], np.int32))
        tap.check()
    return set(tap.taken.owners.values())


def one_pass(
    arguments: argparse.Namespace, names: list[str], grams: set[str], head: str
) -> dict[str, float]:
    """Return the seconds of drawing under the tap."""
    n = arguments.sequences
    tap = Tap(names, grams, head=head)
    tap.n_threads = arguments.threads
    rngs = [np.random.default_rng([0, k]) for k in range(n)]
    with LlamaModel(
        arguments.model, n_ctx=512, n_threads=arguments.threads, safe_kernels=True
    ) as model:
        start = arguments.clock()
        draw_together(model, [FIRST] * n, arguments.tokens - 1, rngs, tap=tap)
        _ = tap.taken
        seconds = arguments.clock() - start
    return {"draw": seconds, "read": 0.0, "whole": seconds}


def two_passes(
    arguments: argparse.Namespace, names: list[str], grams: set[str], head: str
) -> dict[str, float]:
    """Return the seconds of drawing eight sequences at a time, then reading 512 tokens each."""
    del head  # it is computed
    tap, n = TapBefore(names, grams), arguments.sequences
    with LlamaModel(
        arguments.model,
        n_ctx=512,
        n_threads=arguments.threads,
        safe_kernels=True,
        eval_callback=tap.callback,
    ) as model:
        start = arguments.clock()
        with drawn_in_python():
            drawn = [
                np.array([FIRST, *ids], np.int32)
                for first in range(0, n, BEFORE)
                for ids in draw_together(
                    model,
                    [FIRST] * min(BEFORE, n - first),
                    arguments.tokens - 1,
                    [np.random.default_rng([0, k]) for k in range(first, min(n, first + BEFORE))],
                )
            ]
        between = arguments.clock()
        together = np.concatenate(drawn)
        for ids in np.split(together, range(512, len(together), 512)):
            model.clear()
            for begin, end in model.chunks(len(ids)):
                model.decode(ids[begin:end])
                tap.check()
        _ = tap.taken
        end = arguments.clock()
    return {"draw": between - start, "read": end - between, "whole": end - start}


@contextmanager
def drawn_in_python() -> Iterator[None]:
    """Draw a token of each sequence by itself, in float64, while this lasts."""

    def each(logits: np.ndarray, uniforms: np.ndarray) -> TokenIds:
        generators = (np.random.default_rng(int(2**32 * u)) for u in uniforms)
        return np.array([draw(row, rng, 1.0) for row, rng in zip(logits, generators, strict=True)])

    whole = sampling.sampled
    sampling.sampled = each
    try:
        yield
    finally:
        sampling.sampled = whole


def quality(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Return the KLD of files made from each stand-in's statistics, over that of the model's own.

    With tokens of a text, all variants of a seed read the same tokens. A second matrix from the
    model itself, by another seed, shows what other tokens alone change.
    """
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    alphas: dict[tuple[StandIn, int], Sensitivity] = {}
    seconds: dict[tuple[StandIn, int], dict[str, float]] = {}
    variants: list[tuple[StandIn, int]] = [(s, 0) for s in arguments.stand_ins]
    variants += [("none", 1)] * arguments.control
    stem, encoder = arguments.model.stem, arguments.encoder
    n_read = arguments.sequences * arguments.tokens

    def matrix_of(stand_in: StandIn, seed: int) -> Path:
        return folder / f"{stem}-{arguments.source}-{n_read}-{stand_in}-{seed}.imatrix"

    for stand_in, seed in variants:
        matrix = matrix_of(stand_in, seed)
        hessian = matrix.with_suffix(".hessian") if encoder == "gptq" else None
        took = seconds[stand_in, seed] = {}
        start = time.perf_counter()
        if not matrix.exists() or (hessian is not None and not hessian.exists()):
            ramgguf.calibrate(
                arguments.model, matrix, tokens=arguments.source, hessian=hessian,
                n_sequences=arguments.sequences, n_ctx=arguments.tokens, stand_in=stand_in,
                seed=seed, threads=arguments.threads, force=True,
            )  # fmt: skip
            took["capture"] = round(time.perf_counter() - start, 1)
        options: dict[str, Any] = {}
        if arguments.formats is not None:
            options["formats"] = arguments.formats
        if arguments.alpha:
            start = time.perf_counter()
            alphas[stand_in, seed] = alpha_of(arguments, stand_in, matrix, seed)
            options |= {"objective": "sensitivity", "sensitivity": alphas[stand_in, seed]}
            took["alpha"] = round(time.perf_counter() - start, 1)
        for size in arguments.sizes:
            path = file_of(matrix, encoder, size)
            if not path.exists():
                ramgguf.quantize(
                    arguments.model, size, path, encoder=encoder, imatrix=matrix, hessian=hessian,
                    verify=False, threads=arguments.threads, **options,
                )  # fmt: skip
    for size in arguments.sizes:
        files = [file_of(matrix_of(*variant), encoder, size) for variant in variants]
        found = ramgguf.evaluate(
            files, arguments.model, n_ctx=256, n_seq=arguments.windows, threads=arguments.threads
        )
        for (stand_in, seed), path, result in zip(variants, files, found.results, strict=True):
            ratio = kld_ratio(result, found.results[0])
            rows.append(
                {
                    "part": "quality",
                    "stand_in": stand_in,
                    "seed": seed,
                    "source": arguments.source,
                    "encoder": encoder,
                    "size": size,
                    "formats": arguments.formats,
                    "n_bytes": path.stat().st_size,
                    "n_tokens": n_read,
                    "n_windows": arguments.windows,
                    "kld": scores(result).kld,
                    "ratio": [ratio.value, ratio.low, ratio.high],
                    "seconds": seconds[stand_in, seed],
                    "alpha_tokens": arguments.alpha,
                    **alpha_difference(alphas, (stand_in, seed), variants[0]),
                }
            )
    return rows


def alpha_of(
    arguments: argparse.Namespace, stand_in: StandIn, matrix: Path, seed: int
) -> Sensitivity:
    """Return α of all matrices, read on one sequence of the package's texts for calibration."""
    text = arguments.folder / "calibrate.txt"
    text.write_text("\n\n".join(d.text for d in documents() if d.part == "calibrate" and d.text))
    return ramgguf.sensitivity(
        arguments.model, tokens=str(text), imatrix=matrix, n_sequences=1, n_ctx=arguments.alpha,
        stand_in=stand_in, seed=seed, threads=arguments.threads,
    )  # fmt: skip


def alpha_difference(
    alphas: Mapping[tuple[StandIn, int], Sensitivity],
    variant: tuple[StandIn, int],
    first: tuple[StandIn, int],
) -> dict[str, object]:
    """Return by how much α differs from the first variant's: the median of |log ratio|, the 90 %
    quantile, and the log of the geometric mean's ratio.
    """
    if variant not in alphas:
        return {}
    before = {t.name: t.alpha for t in alphas[first].tensors}
    logs = np.log([t.alpha / before[t.name] for t in alphas[variant].tensors])
    middle = float(logs.mean())
    away = np.abs(logs - middle)
    return {
        "alpha_log_ratio": {
            "mean": round(middle, 4),
            "median": round(float(np.median(away)), 4),
            "p90": round(float(np.quantile(away, 0.9)), 4),
        },
    }


def file_of(matrix: Path, encoder: str, size: str) -> Path:
    """Return the path of the file made from a matrix."""
    return matrix.with_name(f"{matrix.stem}-{encoder}-{size}.gguf")


PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, object]]]] = {
    "rates": rates,
    "capture": capture,
    "quality": quality,
}


@dataclass(frozen=True)
class Large:
    """A model by its configuration: weights per token and of the file, and its matrices.

    dense are the weights that every token is multiplied with, those of the head among them; experts
    those of the chosen experts, chosen of so many.
    """

    name: str
    n_layers: int
    dense: float
    head: float
    n_matrices: int
    experts: float = 0.0
    chosen: int = 0
    of: int = 1

    def share(self, reload: float) -> float:
        """Return what α takes by passes that begin at the changed layer, of what whole ones take.

        reload, the time of loading the model, is in whole passes.
        """
        whole = self.dense + self.experts
        layer = (whole - self.head) / self.n_layers
        left = (self.n_layers - k for k in range(self.n_layers))
        depth = Depth(tuple((self.head + n * layer) / whole for n in left), tied=False)
        each = (self.n_matrices - 1) // self.n_layers
        names = [f"blk.{k}.{i}.weight" for k in range(self.n_layers) for i in range(each)]
        tensors = [TensorInfo(name, (1, 1), "F16", 1, 2, 0, 0) for name in (*names, HEAD)]
        costs = Costs(0.0, 1.0, 0.0, reload=reload)
        starts = Starts.planned(depth, costs, 1, map(TensorPass, tensors))
        return share_of(depth, starts.layers, tensors, reload)

    @property
    def n_read(self) -> float:
        """Weights that a step with all experts reads."""
        return self.dense + (self.experts * self.of / self.chosen if self.chosen else 0.0)


def dense_model(
    name: str, n_layers: int, width: int, kv_width: int, inner: int, n_vocab: int
) -> Large:
    layer = 2 * width * width + 2 * width * kv_width + 3 * width * inner
    head = n_vocab * width
    return Large(name, n_layers, n_layers * layer + head, head, 7 * n_layers + 1)


# Their config.json: Llama-3.1-8B and -70B, Qwen3-30B-A3B (32 heads of 128, 4 of keys and values).
LARGE = (
    dense_model("8 B (Llama 3.1)", 32, 4096, 1024, 14336, 128256),
    Large(
        "30B-A3B (Qwen3)",
        48,
        48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 2048 * 128) + 151936 * 2048,
        151936 * 2048,
        48 * 8 + 1,
        experts=48 * 8 * 3 * 2048 * 768,
        chosen=8,
        of=128,
    ),
    dense_model("70 B (Llama 3.1)", 80, 8192, 1024, 28672, 128256),
)


def calculated(lines: Iterable[str]) -> str:
    """Return the table of --calculate, from the lines of the results.

    A core's arithmetic is what F16 rates of 64 sequences at a time come to (for the experts of a
    mixture, which read 64 × chosen / all tokens a step, those of 8), lowest and highest; cores are
    taken to scale perfectly. Passes for α begin at the changed layer: their share of the time of
    whole ones is reckoned as `sensitivity` does, with the slowest load that was measured, and times
    what was measured over what was reckoned. Raises SystemExit where a rate was not measured.
    """
    slow, fast = (measured_flops(lines := list(lines), n) for n in (8, 64))
    over, load = measured_starts(lines)
    columns = (
        *("calculated, F16", "cores", "tokens/s", "24,576 tokens", "α, whole passes"),
        *("from the changed layer", "memory read"),
    )
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for model in LARGE:
        for cores in (8, 16):
            per_token = [
                2 * model.dense / f + 2 * model.experts / s for f, s in zip(fast, slow, strict=True)
            ]
            speeds = sorted(cores / seconds for seconds in per_token)
            drawn = [DRAWN / v / 60 for v in reversed(speeds)]
            alpha = [ALPHA_TOKENS * model.n_matrices / v / 3600 for v in reversed(speeds)]
            share = over * model.share(load / (ALPHA_TOKENS / speeds[1]))
            read = F16_BYTES * model.n_read * speeds[1] / 64 / 1e9
            rows.append(
                f"| {model.name} | {cores} | {span(speeds)} | {span(drawn)} min | "
                f"{span(alpha)} h | {span([share * h for h in alpha])} h | {read:.0f} GB/s |"
            )
    return "\n".join(rows)


def measured_flops(lines: Iterable[str], n_together: int) -> tuple[float, float]:
    """Return the lowest and highest operations/s of a core among models in F16, of medians."""
    rates: dict[str, list[float]] = {}
    for line in lines:
        row = json.loads(line)
        wanted = ("rates", "none", n_together, 1)
        if (row["part"], row.get("stand_in"), row.get("n_together"), row["threads"]) == wanted:
            rates.setdefault(row["model"], []).extend(row["all"])
    found = [2 * MULTIPLIED[m] * float(np.median(all_)) for m, all_ in rates.items()]
    if not found:
        raise SystemExit(
            f"{RESULTS}: no rate of F16, {n_together} at a time, one thread; run rates"
        )
    return min(found), max(found)


def measured_starts(lines: Iterable[str]) -> tuple[float, float]:
    """Return how passes from the changed layer compare to what was reckoned of them (bench/
    alpha_passes.py; the highest among models), and the longest time of loading a model, in seconds.
    """
    rows = [row for row in map(json.loads, lines) if row["part"] == "alpha"]
    whole = {row["model"]: row["seconds"] for row in rows if row["way"] == WAYS[0]}
    later = [row for row in rows if row["way"] == WAYS[1] and row["model"] in whole]
    if not later:
        raise SystemExit(f"{RESULTS}: α was not measured; run bench/alpha_passes.py")
    over = max(row["seconds"] / whole[row["model"]] / row["planned_share"] for row in later)
    return over, max(row["reload_seconds"] for row in later)


def span(values: Sequence[float]) -> str:
    """Return two numbers as a range, to two digits."""
    low, high = (f"{v:.2g}" if v < 10 else f"{v:,.0f}" for v in values)
    return low if low == high else f"{low} to {high}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS, nargs="?")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calculate", action="store_true")
    parser.add_argument("--together", type=int, nargs="+", default=TOGETHER)
    parser.add_argument("--stand-ins", nargs="+", default=["none", "q8_0", "q4_k"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16, help="of each sequence")
    parser.add_argument("--sizes", nargs="+", default=["3.5bpw", "4.5bpw"])
    parser.add_argument("--formats", nargs="+", help="to choose from in quality; default: all")
    parser.add_argument("--source", default="self", help="of the tokens in quality: self, mix")
    parser.add_argument("--encoder", default="search", choices=["search", "gptq"])
    parser.add_argument(
        "--alpha", type=int, default=0, help="tokens that α is read on, for quality"
    )
    parser.add_argument("--control", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("passes"))
    parser.add_argument("--threads", type=int, default=default_threads())
    arguments = parser.parse_args()
    if not arguments.calculate and arguments.model is None:
        parser.error("a part and a model, or --calculate")
    arguments.clock = time.process_time if arguments.threads == 1 else time.perf_counter
    return arguments


def timed(arguments: argparse.Namespace) -> dict[str, object]:
    """Return what seconds are of."""
    return {"threads": arguments.threads, "clock": arguments.clock.__name__}


def main() -> None:
    arguments = parse()
    if arguments.calculate:
        print(calculated(RESULTS.read_text().splitlines()))
        return
    for row in PARTS[arguments.part](arguments):
        line = {"model": arguments.model.name, **row, **timed(arguments), **provenance()}
        print(json.dumps(row))
        with RESULTS.open("a") as out:
            out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
