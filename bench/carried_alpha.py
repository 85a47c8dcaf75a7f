"""α carried from layer to layer by errors of the residual stream: its error and its time.

    python bench/carried_alpha.py models/smol768-f16.gguf --tokens 256
    python bench/carried_alpha.py models/smol768-f16.gguf --tokens 256 --plans 3.6bpw 4.6bpw \
        --imatrix smol768.imatrix.gguf

Two sequences of the package's texts for calibration. On the first, all tensors are read by whole
passes and by passes that end 0, 1, 2 or 4 layers behind the changed one; on the second by whole
passes. α of the second is the truth, whose own error is half of the squared difference between the
two. So the error of a way of reading is what is left of its squared difference from the truth, in
log α without the median (no plan depends on a common factor). A few tensors' KLD depends on single
tokens: spreads are 1.48 × the median of absolute differences. Ways: whole passes in all layers, or
in every k-th, the α of those between interpolated, or carried. Seconds are those of the passes that
a way needs, of the same run. A row per way goes to bench/results/carried_alpha.jsonl.

--plans: files of these sizes, planned by α that `sensitivity` reads of all tensors, and by α that
it carries, from the same sequence; their KLD on WikiText-2, resampled together.
"""

import argparse
import importlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import ramgguf
from provenance import provenance
from ramgguf.cluster.runners import opened
from ramgguf.core.corpus import text_file
from ramgguf.core.mix import documents
from ramgguf.gguf.architecture import layer_of, role_of
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.llama.forward import ForwardRequest, ForwardResult, ForwardRunner
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.token_statistics import standard_error
from ramgguf.llama.tokens import TokenRequest
from ramgguf.sensitivity import is_probed, probe_format
from ramgguf.sensitivity.carrying import is_carried
from ramgguf.sensitivity.impute import Member, impute
from ramgguf.sensitivity.result import LayerReading, Reading
from ramgguf.sensitivity.starts import Depth, Starts, TensorPass
from ramgguf.sensitivity.timing import Costs
from scores import kld_ratio, scores

RESULTS = Path(__file__).parent / "results" / "carried_alpha.jsonl"
HOPS = (0, 1, 2, 4)
STRIDES = (2, 4, 6, 8)


@dataclass
class Found:
    """Readings of one sequence, by the tensor's name, and the seconds of each."""

    whole: dict[str, Reading] = field(default_factory=dict)
    layers: dict[int, dict[str, LayerReading]] = field(default_factory=dict)
    seconds: dict[tuple[str, int | None], float] = field(default_factory=dict)


def read(
    file: GGUFFile, passes: ForwardRunner, ids: TokenIds, hops: Sequence[int], each: float
) -> Found:
    """Read all tensors of the trunk's layers: by whole passes, and for each of hops."""
    depth, found = Depth.of(file), Found()
    tensors = [t for t in file.tensors if is_probed(file, t) and layer_of(t.name) is not None]
    costs = Costs(0.0, each, 0.0, reload=passes.reload_seconds)
    last = len(depth.shares) - 1
    ends = [None, *hops]
    starts = Starts.planned(depth, costs, 1, [TensorPass(t) for t in tensors for _ in ends])
    for tensor in sorted(tensors, key=depth.first):
        change = (tensor.name, probe_format(tensor))
        for hop in ends:
            end = None if hop is None else min(depth.first(tensor) + hop, last)
            asked = ForwardRequest((change,), (ids,), starts.start(tensor), end)
            began = time.perf_counter()
            ((_, result),) = passes.run([asked])
            found.seconds[tensor.name, hop] = time.perf_counter() - began
            keep(found, tensor, change[1], hop, end, result)
    return found


def keep(
    found: Found,
    tensor: TensorInfo,
    format_name: str,
    hop: int | None,
    end: int | None,
    result: ForwardResult,
) -> None:
    """Add a reading."""
    if hop is None or end is None:
        found.whole[tensor.name] = Reading(
            name=tensor.name, format=format_name, nmse=result.nmse[0],
            kld=float(result.kld.mean()), standard_error=standard_error(result.kld),
        )  # fmt: skip
        return
    assert result.errors is not None
    found.layers.setdefault(hop, {})[tensor.name] = LayerReading(
        name=tensor.name, format=format_name, nmse=result.nmse[0], layer=end,
        error=float(result.errors.mean()),
    )  # fmt: skip


def rows(file: GGUFFile, first: Found, second: Found) -> Iterator[dict[str, object]]:
    """Yield what each way of reading comes to."""
    tensors = [file.tensor(name) for name in first.whole]
    members = [
        Member(t.name, role_of(t.name, file.architecture), layer_of(t.name), t.n_weights)
        for t in tensors
    ]
    names = [m.name for m in members]
    truth = {name: second.whole[name].alpha for name in names}
    alike = logs({name: first.whole[name].alpha for name in names}, truth, names)
    noise = spread(alike) ** 2 / 2
    yield way("whole passes", None, None, np.sqrt(noise), np.nan, len(names), sum_of(first, names))
    n_layers = file.n_trunk_layers or 0
    free = {t.name for t in tensors if is_carried(file, t)}
    for stride in STRIDES:
        apart = {m.name for m in members if is_apart(m.layer or 0, n_layers, stride)}
        hops: tuple[int | None, ...] = (None, *HOPS)
        for hop in hops:
            some = apart if hop is None else apart | (set(names) - free)
            readings = {name: first.whole[name] for name in some}
            layers = {} if hop is None else {n: first.layers[hop][n] for n in free}
            made = {t.name: t.alpha for t in impute(members, readings, layers)}
            between = [name for name in names if name not in some]
            all_of_them, those = logs(made, truth, names), logs(made, truth, names, only=between)
            seconds = sum_of(first, some) + sum(first.seconds[name, hop] for name in layers)
            yield way(
                "interpolated" if hop is None else "carried", stride, hop,
                np.sqrt(max(0.0, spread(all_of_them) ** 2 - noise)),
                np.sqrt(max(0.0, spread(those) ** 2 - noise)),
                len(some), seconds,
            )  # fmt: skip


def plans(arguments: argparse.Namespace, text: Path) -> Iterator[dict[str, object]]:
    """Yield the KLD of files planned by α that was read of all tensors, and that was carried."""
    folder: Path = arguments.folder
    whole = partial(
        ramgguf.sensitivity, arguments.model, tokens=str(text), n_ctx=arguments.tokens,
        imatrix=arguments.imatrix, threads=arguments.threads,
    )  # fmt: skip
    found = {"whole passes": whole(n_sequences=1)}
    alpha = importlib.import_module("ramgguf.sensitivity.alpha")
    with patch.object(alpha, "choose", carried_on_one):
        found["carried"] = whole()
    assert found["carried"].tokens.sha256 == found["whole passes"].tokens.sha256
    for size in arguments.plans:
        files = []
        for name, sensitivity in found.items():
            files.append(folder / f"{arguments.model.stem}-{size}-{name.split()[0]}.gguf")
            ramgguf.quantize(
                arguments.model, size, files[-1], imatrix=arguments.imatrix, verify=False,
                objective="sensitivity", sensitivity=sensitivity,
                threads=arguments.threads, force=True,
            )  # fmt: skip
        results = ramgguf.evaluate(
            files, arguments.model, n_ctx=256, n_seq=arguments.windows, threads=arguments.threads
        ).results
        for (name, sensitivity), result in zip(found.items(), results, strict=True):
            ratio = kld_ratio(result, results[0])
            yield {
                "part": "plans",
                "way": name,
                "size": size,
                "kld": scores(result).kld,
                "ratio": [ratio.value, ratio.low, ratio.high],
                "n_windows": arguments.windows,
                "n_measured": sum(t.origin == "measured" for t in sensitivity.tensors),
                "seconds": round(sensitivity.seconds, 1),
            }


def carried_on_one(works: Sequence[Any], seconds_of: Any, *_: object) -> tuple[Any, float]:
    """Return what carries α and reads one sequence, in place of what the time allows."""
    work = next(w for w in works if w.carried and w.n_sequences == 1)
    return work, seconds_of(work)


def is_apart(layer: int, n_layers: int, stride: int) -> bool:
    """Return whether whole passes are run in the layer."""
    return layer < 2 or layer > n_layers - 3 or (layer - 2) % stride == 0


def logs(
    made: Mapping[str, float],
    truth: Mapping[str, float],
    names: Sequence[str],
    only: Sequence[str] | None = None,
) -> np.ndarray:
    """Return log α over the true one, without the median over names."""
    found = np.log([made[name] / truth[name] for name in names])
    found -= np.median(found)
    wanted = None if only is None else set(only)
    return found[[wanted is None or name in wanted for name in names]]


def spread(values: np.ndarray) -> float:
    """Return what the standard deviation would be of normal values with this median of sizes."""
    return 1.4826 * float(np.median(np.abs(values)))


def sum_of(found: Found, names: Sequence[str] | set[str]) -> float:
    return sum(found.seconds[name, None] for name in names)


def way(
    name: str,
    stride: int | None,
    hop: int | None,
    error: float,
    error_between: float,
    n_whole: int,
    seconds: float,
) -> dict[str, object]:
    return {
        "way": name,
        "stride": stride,
        "hops": hop,
        "error": round(float(error), 3),
        "error_between": None if np.isnan(error_between) else round(float(error_between), 3),
        "n_whole": n_whole,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=256, help="of each of the two sequences")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plans", nargs="+", help="sizes of files that are compared")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--folder", type=Path, default=Path("models"))
    arguments = parser.parse_args()
    text = arguments.folder / "calibrate.txt"
    text.write_text("\n\n".join(d.text for d in documents() if d.part == "calibrate" and d.text))
    if arguments.plans:
        save(arguments, plans(arguments, text))
        return
    request = TokenRequest(
        "search", tokens="text", corpus=text_file(text), n_sequences=2, n_ctx=arguments.tokens
    )
    with (
        opened(
            arguments.model, request, folder=None, journal=None, threads=arguments.threads,
            executor=None,
        ) as at,
        at.opening as passes,
    ):  # fmt: skip
        sequences = passes.draw(request, range(2))
        passes.prepare(sequences)
        each = passes.seconds(sequences[0])
        first = read(at.file, passes, sequences[0], HOPS, each)
        second = read(at.file, passes, sequences[1], (), each)
        save(arguments, rows(at.file, first, second))


def save(arguments: argparse.Namespace, made: Iterable[dict[str, object]]) -> None:
    about = {"model": arguments.model.name, "n_tokens": arguments.tokens}
    with RESULTS.open("a") as out:
        for row in made:
            print(row)
            out.write(json.dumps({**about, **row, "threads": arguments.threads, **provenance()}))
            out.write("\n")


if __name__ == "__main__":
    main()
