"""Sensitivities by passes that begin at the changed layer, against whole passes: time and α.

    python bench/alpha_passes.py models/smol768-f16.gguf --tokens 256

Both ways read all matrices on one sequence of random ids, in turn, --rounds times. Seconds are CPU
time of the run and its children, which other work on the machine changes little with one thread.
Appends a line per way to bench/results/passes.jsonl, for bench/passes.py --calculate, too.
"""

import argparse
import json
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import PropertyMock, patch

import numpy as np

import ramgguf
from provenance import provenance
from ramgguf.cluster.remote_runner import RemoteRunner
from ramgguf.gguf.reader import TensorInfo, open_gguf
from ramgguf.llama.forward import ForwardRequest, ForwardResult
from ramgguf.sensitivity import Sensitivity
from ramgguf.sensitivity.starts import Depth, Starts, TensorPass
from ramgguf.sensitivity.timing import Costs

RESULTS = Path(__file__).parent / "results" / "passes.jsonl"
WAYS = ("whole", "from the changed layer")


def alpha(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Return the seconds of both ways to read α, and by how much what they read differs."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, Sensitivity] = {}
    seen: dict[str, Seen] = {}
    for _ in range(arguments.rounds):
        for way in WAYS:
            with starts_of(whole=way == WAYS[0]) as seen[way]:
                start = cpu_seconds()
                found[way] = ramgguf.sensitivity(
                    arguments.model,
                    tokens="random",
                    n_sequences=1,
                    n_ctx=arguments.tokens,
                    threads=arguments.threads,
                )
                seconds[way].append(cpu_seconds() - start)
    with open_gguf(arguments.model) as file:
        depth = Depth.of(file)
        tensors = [file.tensor(t.name) for t in found[WAYS[0]].tensors]
    pairs = list(zip(*(found[way].tensors for way in WAYS), strict=True))
    return [
        {
            "part": "alpha",
            "way": way,
            "n_tensors": len(tensors),
            "n_tokens": arguments.tokens,
            "starts": sorted(seen[way].layers),
            "planned_share": share_of(depth, tuple(sorted(seen[way].layers)), tensors, reload=0.0),
            "reload_seconds": seen[WAYS[1]].reload_seconds,
            "seconds": float(np.median(seconds[way])),
            "all": seconds[way],
            "largest_relative_difference": max(abs(a.alpha / b.alpha - 1) for a, b in pairs),
        }
        for way in WAYS
    ]


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@dataclass
class Seen:
    """The layers at which passes began, and the seconds that loading the model takes."""

    layers: set[int] = field(default_factory=set)
    reload_seconds: float | None = None


@contextmanager
def starts_of(*, whole: bool) -> Iterator[Seen]:
    """Note where passes begin while this lasts: with `whole`, at the first layer."""
    seen, run = Seen(), RemoteRunner.run

    def noted(
        self: RemoteRunner, wanted: Sequence[ForwardRequest]
    ) -> Iterator[tuple[int, ForwardResult]]:
        seen.reload_seconds = self._opened.reload_seconds
        for position, result in run(self, wanted):
            if result.why_whole is None:
                seen.layers.add(wanted[position].start)
            yield position, result

    with patch.object(RemoteRunner, "run", noted):
        if not whole:
            yield seen
            return
        with patch.object(RemoteRunner, "reload_seconds", PropertyMock(return_value=None)):
            yield seen


def share_of(
    depth: Depth, layers: tuple[int, ...], tensors: Sequence[TensorInfo], reload: float
) -> float:
    """Return the seconds with these starts over those of whole passes, by the weights that passes
    multiply; reload is in whole passes.

    The unchanged model's passes, before and at the end, are parts of both.
    """
    costs = Costs(0.0, 1.0, 0.0, reload=reload)
    later, whole = Starts(depth, costs, 1, layers), Starts(depth, costs, 1)
    passes = [TensorPass(t) for t in tensors]
    return later.whole(passes) / whole.whole(passes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    for row in alpha(arguments):
        timed = {"threads": arguments.threads, "clock": "process_time"}
        print(json.dumps(row))
        with RESULTS.open("a") as out:
            out.write(json.dumps({"model": arguments.model.name, **row, **timed, **provenance()}))
            out.write("\n")


if __name__ == "__main__":
    main()
