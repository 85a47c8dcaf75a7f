"""From a model file to a Sensitivity: what each tensor's quantization does to the model's output.

α_t = KLD caused by quantizing tensor t alone ÷ its NMSE. The KLD of a whole plan is then about
Σ α_t · NMSE_t (the linearity theorem of HIGGS, arXiv 2411.17525). Tokens sampled from the model
itself serve as well as text, so no data are needed.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf import formats
from ramgguf.engine.llama import Logits
from ramgguf.engine.probe import Probe
from ramgguf.engine.system import system_info
from ramgguf.engine.wire import TokenIds
from ramgguf.errors import EngineError, PlanError
from ramgguf.fill_in import Member, fill_in
from ramgguf.gguf_io import GGUFFile, TensorInfo
from ramgguf.hub import origin_of
from ramgguf.imatrix import Imatrix
from ramgguf.probe_tokens import Request, draw_sequences
from ramgguf.progress import Progress
from ramgguf.roles import layer_of, never_quantized, role_of
from ramgguf.schema import ImportanceSource, Source
from ramgguf.sensitivities import ProbeTokens, Reading, Sensitivity
from ramgguf.sensitivity_journal import Journal, Settings
from ramgguf.simulation import SOURCES, simulated
from ramgguf.token_statistics import standard_error
from ramgguf.units import format_seconds
from ramgguf.version import __version__

# The first that suits a tensor's rows is its probe: 4-bit errors are where plans are made.
PROBE_FORMATS = ("Q4_K", "Q4_0")
MAX_SEQUENCES = 4
MAX_REFERENCE_BYTES = 4 << 30


def sensitivity(
    file: GGUFFile,
    request: Request,
    *,
    folder: Path,
    journal_path: Path,
    threads: int,
    progress: Progress,
    announce: Callable[[str], None] = lambda _: None,
) -> Sensitivity:
    """Return every quantizable tensor's α, measured by forward passes of llama.cpp.

    folder takes a copy of the model while this runs; journal_path the readings, from which a run
    that was killed goes on. announce is told the planned cost before it is spent. Raises
    EngineError when llama.cpp fails or the model does not come back unchanged.
    """
    start = time.perf_counter()
    tensors = [t for t in file.tensors if _is_probed(file, t)]
    if not tensors:
        raise PlanError(f"{file.paths[0]}: no tensor can be probed; a source in F32, F16 or BF16")
    with (
        Journal(journal_path) as journal,
        Probe(file, folder, n_ctx=request.n_ctx, n_threads=threads) as probe,
    ):
        settings = journal.settings
        if settings is None:
            settings = _settle(file, request, probe, tensors, announce)
            journal.begin(settings)
        else:
            announce(f"{settings.promise}; {len(journal.readings)} tensors are done")
        _check_resumed(settings, file, request, journal_path)
        reference = [probe.logits(ids) for ids in settings.sequences]
        run = _Run(file, probe, settings, reference, request.imatrix, threads)
        wanted = [t for t in tensors if t.name in set(settings.names)]
        progress.start("sensitivity", len(wanted), "tensors")
        try:
            for tensor in wanted:
                if tensor.name not in journal.readings:
                    reading = run.read(tensor)
                    file.require_unchanged()
                    journal.add(reading)
                progress.advance(1)
        finally:
            progress.finish()
        if run.divergence().any():
            raise EngineError(f"{file.paths[0]}: the copy did not come back to the original")
        readings = dict(journal.readings)
        members = [_member(file, t) for t in tensors]
        return Sensitivity(
            ramgguf_version=__version__,
            source=settings.source,
            encoder=request.encoder,
            imatrix=settings.imatrix,
            engine=system_info().build,
            tokens=settings.tokens,
            tensors=fill_in(members, readings),
            seconds=time.perf_counter() - start,
            notes=settings.notes,
        )


@dataclass(frozen=True)
class _Run:
    """One measurement under way; reference holds the unmodified model's logits."""

    file: GGUFFile
    probe: Probe
    settings: Settings
    reference: Sequence[Logits]
    imatrix: Imatrix | None
    threads: int

    def divergence(self) -> NDArray[np.float64]:
        """Return the KLD of every token of all sequences, in nats."""
        pairs = zip(self.settings.sequences, self.reference, strict=True)
        return np.concatenate([self.probe.divergence(ids, logits) for ids, logits in pairs])

    def read(self, tensor: TensorInfo) -> Reading:
        """Return what the tensor's quantization alone does to the output."""
        format_name = probe_format(tensor)
        data, nmse = simulated(
            self.file,
            tensor,
            format_name,
            encoder=self.settings.encoder,
            imatrix=self.imatrix,
            threads=self.threads,
        )
        with self.probe.replaced(tensor, data):
            kld = self.divergence()
        return Reading(
            name=tensor.name,
            format=format_name,
            nmse=nmse,
            kld=max(0.0, float(kld.mean())),
            standard_error=standard_error(kld),
        )


def probe_format(tensor: TensorInfo) -> str:
    """Return the format in which the tensor's sensitivity is read."""
    return next(f for f in PROBE_FORMATS if formats.suits(f, tensor.row_length))


def _is_probed(file: GGUFFile, tensor: TensorInfo) -> bool:
    return (
        tensor.type_name in SOURCES
        and never_quantized(tensor.name, tensor.shape, file.architecture) is None
        and any(formats.suits(f, tensor.row_length) for f in PROBE_FORMATS)
    )


def _member(file: GGUFFile, tensor: TensorInfo) -> Member:
    role = role_of(tensor.name, file.architecture)
    return Member(tensor.name, role, layer_of(tensor.name), tensor.n_weights)


def _settle(
    file: GGUFFile,
    request: Request,
    probe: Probe,
    tensors: Sequence[TensorInfo],
    announce: Callable[[str], None],
) -> Settings:
    """Return the tokens and tensors that fit the time, and a sentence about what is left out.

    announce is told the cost before most of the tokens are drawn.
    """
    most = request.n_sequences or MAX_SEQUENCES
    bytes_each = 4 * request.n_ctx * probe.model.vocab.n_tokens
    most = max(1, min(most, MAX_REFERENCE_BYTES // bytes_each))
    start = time.perf_counter()
    sequences = draw_sequences(probe.model, request, range(1))
    seconds_drawing = time.perf_counter() - start
    seconds_each = _seconds_per_pass(probe, sequences[0])
    n_sequences, stride = most, 1
    if request.n_sequences is None:
        affordable = request.seconds / (seconds_each * (len(tensors) + 2) + seconds_drawing)
        n_sequences = max(1, min(most, int(affordable)))
        stride = max(1, math.ceil(n_sequences / affordable))
    names = tuple(t.name for t in _strided(file, tensors, stride))
    seconds = n_sequences * (seconds_each * len(names) + seconds_drawing)
    promise = (
        f"{len(names)} of {len(tensors)} tensors × {n_sequences} sequences of {request.n_ctx} "
        f"tokens ({request.tokens}), about {format_seconds(seconds)}"
    )
    announce(promise)
    sequences += draw_sequences(probe.model, request, range(1, n_sequences))
    notes = []
    if stride > 1:
        notes.append(
            f"to keep to {format_seconds(request.seconds)}, {len(names)} of {len(tensors)} tensors "
            "were measured; those between are interpolated within their role"
        )
    digest = hashlib.sha256(b"".join(ids.tobytes() for ids in sequences)).hexdigest()
    return Settings(
        source=Source(
            path=str(file.paths[0]),
            n_bytes=file.n_bytes,
            header_sha256=file.header_sha256,
            architecture=file.architecture,
            name=file.name,
            hub=origin_of(file.paths[0]),
        ),
        encoder=request.encoder,
        imatrix=request.imatrix.source if request.imatrix else None,
        tokens=ProbeTokens(
            kind=request.tokens,
            n_sequences=n_sequences,
            n_tokens=sum(len(ids) for ids in sequences),
            seed=request.seed,
            sha256=digest,
            text=request.corpus.name if request.corpus else None,
        ),
        ids=tuple(tuple(int(i) for i in ids) for ids in sequences),
        names=names,
        promise=promise,
        notes=tuple(notes),
    )


def _seconds_per_pass(probe: Probe, ids: TokenIds) -> float:
    """Return how long one sequence takes, the comparison of its logits included."""
    reference = probe.logits(ids)
    start = time.perf_counter()
    probe.divergence(ids, reference)
    return time.perf_counter() - start


def _strided(file: GGUFFile, tensors: Sequence[TensorInfo], stride: int) -> Iterator[TensorInfo]:
    """Yield the tensors outside of layers, and of every stride-th layer; both ends twice as dense.

    The first two and the last two layers are unlike the others, and are always measured.
    """
    last = max((layer_of(t.name) or 0 for t in tensors), default=0)
    for tensor in tensors:
        layer = layer_of(tensor.name)
        if layer is None or layer < 2 or layer > last - 2 or (layer - 2) % stride == 0:
            yield tensor


def _check_resumed(settings: Settings, file: GGUFFile, request: Request, path: Path) -> None:
    """Raise PlanError when the journal is of another model, encoder or choice of tokens."""
    same = (
        settings.source.header_sha256 == file.header_sha256
        and settings.source.n_bytes == file.n_bytes
        and settings.encoder == request.encoder
        and _sha(settings.imatrix) == _sha(request.imatrix.source if request.imatrix else None)
        and (settings.tokens.kind, settings.tokens.seed) == (request.tokens, request.seed)
        and request.n_sequences in (None, settings.tokens.n_sequences)
    )
    if not same:
        raise PlanError(
            f"{path} is of another model, encoder, imatrix or choice of tokens; "
            "remove it to start anew"
        )


def _sha(imatrix: ImportanceSource | None) -> str | None:
    return None if imatrix is None else imatrix.identity
