"""What the steps of an effort cost on this model and machine, measured on one of its layers."""

import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from ramgguf.calibrate import calibrate
from ramgguf.core.errors import EngineError
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Silent
from ramgguf.evaluate import window_seconds
from ramgguf.gguf.architecture import layer_of
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.quantize.schedule import FEEDBACK, GATE_CTX, N_CTX, N_DOMAINS, Costs
from ramgguf.quants.decoded import write_decoded
from ramgguf.quants.hessian import add_grams
from ramgguf.quants.imatrix import load_importance
from ramgguf.quants.roundtrip import simulated
from ramgguf.quants.stand_in import ReadyStandIn
from ramgguf.sensitivity import is_probed, probe_format
from ramgguf.transform import CHECK_CTX, most_checks

SAVES = 3  # of Hessians: about one a minute, and their file
LEAST_READING = 0.5  # of a sequence's time with one layer's Hessians: what is not for these
# Sequences read in the time that a check of scales takes, by the model with and without.
SCALE_READS = 2 * N_DOMAINS * CHECK_CTX / N_CTX
LEAST_GAIN = 1.2  # a candidate that takes so many times the source's time is decoded


class _Reading(Silent):
    """Progress that takes the seconds of reading, without loading and writing."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start: float | None = None

    def start(self, stage: str, total: int, unit: str) -> None:
        self._start = time.perf_counter() if stage == "calibrate" else None

    def finish(self) -> None:
        if self._start is not None:
            self.seconds += time.perf_counter() - self._start


def measured_costs(
    file: GGUFFile,
    scratch: Path,
    write: float,
    candidate: Path,
    tokens: str,
    threads: int | None,
    stand_in: ReadyStandIn | None = None,
    *,
    decodes: bool = False,
) -> Costs:
    """Return the costs; write is what the candidate by priors took. decodes: candidates may be
    decoded for their gates, where that is faster.

    A sequence is read under the tap, by the stand-in where there is one, with the Hessians of a
    layer in the middle, whose weights are then rounded with error feedback.
    Raises EngineError when llama.cpp fails.
    """
    weights = [t for t in file.tensors if is_probed(file, t)]
    layers = sorted({layer for t in weights if (layer := layer_of(t.name)) is not None})
    middle = layers[len(layers) // 2] if layers else 0
    probed = [t for t in weights if layer_of(t.name) == middle] or weights[:1]
    pattern = "^(" + "|".join(re.escape(t.name) for t in probed) + ")$"
    imatrix, hessian = scratch / "probe.imatrix.gguf", scratch / "probe.hessian.gguf"

    reading = _Reading()
    calibrate(
        file.paths[0], imatrix, tokens=tokens, n_sequences=1, n_ctx=N_CTX, hessian=hessian,
        hessian_pattern=pattern, stand_in=stand_in or "auto", force=True, threads=threads,
        progress=reading,
    )  # fmt: skip
    hessian_bytes = hessian.stat().st_size * max(1, len(layers))
    with open_gguf(hessian) as grams:
        widths = [gram.row_length for gram in grams.tensors]
    gram = _gram_seconds(widths, threads or default_threads())
    save = SAVES * _copy_seconds(hessian) * max(1, len(layers))
    n_weights = sum(t.n_weights for t in weights if layer_of(t.name) is not None)
    seconds = {}
    for encoder in FEEDBACK:
        weighed = load_importance(imatrix, hessian, encoder)
        start, n_swept = time.perf_counter(), 0
        for tensor in probed:
            with suppress(EngineError, ValueError):
                simulated(
                    file, tensor, probe_format(tensor), encoder=encoder, imatrix=weighed,
                    threads=threads or default_threads(),
                )  # fmt: skip
                n_swept += tensor.n_weights
        seconds[encoder] = (time.perf_counter() - start) / max(1, n_swept) * n_weights
    window = window_seconds(candidate, n_ctx=GATE_CTX, threads=threads)
    window, decode = _decoded(file, scratch, candidate, window, threads) if decodes else (window, 0)
    for path in (imatrix, hessian):
        path.unlink(missing_ok=True)
    return Costs(
        write=write,
        read=max(reading.seconds - gram, LEAST_READING * reading.seconds),
        gram=gram * max(1, len(layers)),
        feedback=seconds["gptq"],
        descent=seconds["descent"],
        hessian_bytes=hessian_bytes,
        window=window,
        decode=decode,
        save=save,
        scale=scale_seconds(file, write, reading.seconds),
    )


def scale_seconds(file: GGUFFile, write: float, sequence: float) -> float:
    """Return what choosing scales and checking them takes at most, 0 where none can move.

    write is what a candidate takes, from measuring to writing, which is more than choosing scales
    and writing the scaled model do; sequence what reading N_CTX tokens takes.
    """
    return most_checks(file) * (write + SCALE_READS * sequence)


def _copy_seconds(path: Path) -> float:
    """Return the seconds of writing as much as the file holds, beside it."""
    start, copy = time.perf_counter(), path.with_name(f"{path.name}.copy")
    shutil.copyfile(path, copy)
    seconds = time.perf_counter() - start
    copy.unlink()
    return seconds


def _decoded(
    file: GGUFFile, scratch: Path, candidate: Path, window: float, threads: int | None
) -> tuple[float, float]:
    """Return the seconds of a window and of decoding a candidate before its gate; 0 where a gate of
    few windows takes no less with it.
    """
    plain = window_seconds(file.paths[0], n_ctx=GATE_CTX, threads=threads)
    if window < LEAST_GAIN * plain:
        return window, 0.0
    path, start = scratch / "probe.decoded.gguf", time.perf_counter()
    with open_gguf(candidate) as coded:
        write_decoded(coded, file, path, threads=threads or default_threads())
    seconds = time.perf_counter() - start
    path.unlink()
    gained = N_DOMAINS * (window - plain)
    return (plain, seconds) if seconds < gained else (window, 0.0)


def _gram_seconds(widths: Sequence[int], threads: int) -> float:
    """Return the seconds of adding a sequence's XᵀX for inputs of so many columns each."""
    seconds = 0.0
    for n in widths:
        x, gram = np.ones((N_CTX, n), np.float32), np.zeros((n, n), np.float32)
        add_grams([(x[:1], gram)], threads)  # its pages are there from now on
        start = time.perf_counter()
        add_grams([(x, gram)], threads)
        seconds += time.perf_counter() - start
    return seconds
