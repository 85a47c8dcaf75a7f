"""From a model file to a Sensitivity: what each tensor's quantization does to the model's output.

α_t = KLD caused by quantizing tensor t alone ÷ its NMSE. The KLD of a whole plan is then about
Σ α_t · NMSE_t (the linearity theorem of HIGGS, arXiv 2411.17525). Tokens sampled from the model
itself serve as well as text, so no data are needed.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ramgguf.cluster.runners import opened
from ramgguf.core.errors import EngineError, PlanError
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.units import format_count, format_seconds
from ramgguf.core.values import TokenKind
from ramgguf.core.version import __version__
from ramgguf.gguf.architecture import layer_of, never_quantized, role_of
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.identity import Source, difference
from ramgguf.gguf.reader import GGUFFile, TensorInfo, open_gguf
from ramgguf.llama.forward import ForwardRequest, ForwardRunner, require_same_logits
from ramgguf.llama.sources import dataset_name, draw, of_sources
from ramgguf.llama.tokens import N_CTX, TokenRequest
from ramgguf.quants import formats
from ramgguf.quants.coverage import coverage_notes
from ramgguf.quants.encoders import EncoderName
from ramgguf.quants.imatrix import ImportanceSource, load_importance
from ramgguf.quants.roundtrip import SOURCES
from ramgguf.quants.stand_in import FINE, StandIn, chosen_stand_in
from ramgguf.sensitivity.carrying import STRIDE, is_carried, layer_pass, tells_errors
from ramgguf.sensitivity.impute import CARRIED_ERROR, READ_ERROR, Member, impute
from ramgguf.sensitivity.journal import Journal, Settings
from ramgguf.sensitivity.readings import PROBE_FORMATS, probe_format, read_all
from ramgguf.sensitivity.result import ProbeTokens, Sensitivity
from ramgguf.sensitivity.starts import Depth, Starts, TensorPass
from ramgguf.sensitivity.timing import Timer, choose, probe, spread_order

MAX_SEQUENCES = 4
MAX_REFERENCE_BYTES = 4 << 30


def measure_alpha(
    file: GGUFFile,
    request: TokenRequest,
    opening: AbstractContextManager[ForwardRunner],
    *,
    journal_path: Path,
    progress: Progress,
    announce: Callable[[str], None] = lambda _: None,
    timer: Timer | None = None,
) -> Sensitivity:
    """Return every quantizable tensor's α, measured by forward passes of llama.cpp.

    opening gives the passes; journal_path takes the readings, from which a run that was killed goes
    on, wherever its passes run. announce gets the planned cost before it is spent. timer has run
    since the request was made; where no number of sequences is asked for, readings end with its
    time, and tensors that were not read are imputed. Raises ImatrixError for another model's
    matrix, EngineError when llama.cpp fails or the model does not come back unchanged.
    """
    timer = timer or Timer(request.seconds)
    tensors = [t for t in file.tensors if is_probed(file, t)]
    if not tensors:
        raise PlanError(
            f"{file.paths[0]}: no tensor can be probed; take the model in F32, F16 or BF16"
        )
    coverage = coverage_notes(file, request.imatrix)
    with Journal(journal_path) as journal, opening as passes:
        settings = journal.settings
        if settings is None:
            settings = _settle(file, request, passes, tensors, coverage, announce, timer)
            journal.begin(settings)
        else:
            announce(
                f"{settings.promise}; {format_count(len(journal.readings), 'tensor')} done already"
            )
            _check_resumed(settings, file, request, journal_path)
            require_same_logits(passes, settings.sequences, settings.fingerprint, journal_path)
        by_name = {t.name: t for t in tensors}
        depth = Depth.of(file)
        carried = [by_name[name] for name in settings.carried]
        wanted = _passes(depth, [by_name[name] for name in settings.names], carried)
        hurry = timer if request.n_sequences is None else None
        read_all(
            file, wanted, passes, settings, journal,
            progress=progress, announce=announce, timer=hurry,
        )  # fmt: skip
        unchanged = ForwardRequest((), settings.sequences)
        if any(found.kld.any() for _, found in passes.run([unchanged])):
            raise EngineError(f"{file.paths[0]}: the copy did not come back to the original")
        readings = dict(journal.readings)
        notes = settings.notes
        if len(readings) < len(settings.names):
            said = (
                f"the time was over after {len(readings)} of "
                f"{format_count(len(settings.names), 'tensor')}"
            )
            notes += (f"{said}; the others are {_between(settings.carried)} within their role",)
        members = [_member(file, t) for t in file.tensors if _is_planned(file, t)]
        return Sensitivity(
            ramgguf_version=__version__,
            source=settings.source,
            encoder=request.encoder,
            imatrix=settings.imatrix,
            engine=passes.build,
            cpus=passes.cpus,
            stand_in=settings.stand_in,
            tokens=settings.tokens,
            tensors=impute(members, readings, journal.layer_readings),
            seconds=timer.spent,
            notes=notes,
        )


def is_probed(file: GGUFFile, tensor: TensorInfo) -> bool:
    """Return whether passes can read the tensor's sensitivity: a matrix with a probe format."""
    return _is_matrix(file, tensor) and any(
        formats.suits(f, tensor.row_length) for f in PROBE_FORMATS
    )


def _is_planned(file: GGUFFile, tensor: TensorInfo) -> bool:
    """Return whether plans ask for the tensor's α: in F32, its rows need not suit a block."""
    return is_probed(file, tensor) or (tensor.type_name == "F32" and _is_matrix(file, tensor))


def _is_matrix(file: GGUFFile, tensor: TensorInfo) -> bool:
    is_kept = never_quantized(tensor.name, tensor.shape, file.architecture) is not None
    return tensor.type_name in SOURCES and not is_kept


def _member(file: GGUFFile, tensor: TensorInfo) -> Member:
    role = role_of(tensor.name, file.architecture, tied=file.has_tied_embedding)
    return Member(tensor.name, role, layer_of(tensor.name), tensor.n_weights)


def _settle(
    file: GGUFFile,
    request: TokenRequest,
    passes: ForwardRunner,
    tensors: Sequence[TensorInfo],
    coverage: Sequence[str],
    announce: Callable[[str], None],
    timer: Timer,
) -> Settings:
    """Return the tokens and tensors that fit the time, and a sentence about what is left out.

    announce gets the cost before most of the tokens are drawn.
    """
    most = request.n_sequences or MAX_SEQUENCES
    bytes_each = 4 * request.n_ctx * passes.n_vocab
    most = max(1, min(most, MAX_REFERENCE_BYTES // bytes_each))
    costs = probe(passes, request, tensors, probe_format, timer.clock)
    depth = Depth.of(file)

    def seconds_of(work: _Work) -> float:
        wanted = _passes(depth, work.tensors, work.carried)
        return Starts.planned(depth, costs, work.n_sequences, wanted).whole(wanted)

    if request.n_sequences is None:
        works = _works(file, tensors, most, passes, request)
        work, seconds = choose(works, seconds_of, timer, announce)
    else:
        work = _Work(most, _strided(file, tensors, 1))
        seconds = seconds_of(work)
    n_sequences, names = work.n_sequences, tuple(t.name for t in work.tensors)
    seconds += timer.spent
    kind, text = _told(request)
    promise = (
        f"{len(names)} of {format_count(len(tensors), 'tensor')} × "
        f"{format_count(n_sequences, 'sequence')} of {request.n_ctx} tokens "
        f"({text if request.sources else kind}), about {format_seconds(seconds)}"
    )
    announce(promise)
    sequences = draw(passes, request, range(1))
    sequences += draw(passes, request, range(1, n_sequences))
    notes = list(coverage)
    if request.stand_in is not None:
        notes.append(
            f"read on a stand-in in {request.stand_in}: its kernels round activations, which "
            "changes the output as much as one tensor does; α of the model itself plans better"
        )
    if len(names) < len(tensors):
        notes.append(
            f"to keep to {format_seconds(timer.limit)}, α was read of {len(names)} of "
            f"{format_count(len(tensors), 'tensor')}; those between are {_between(work.carried)} "
            "within their role"
        )
    digest = hashlib.sha256(b"".join(ids.tobytes() for ids in sequences)).hexdigest()
    return Settings(
        source=Source.of(file),
        encoder=request.encoder,
        imatrix=request.imatrix.source if request.imatrix else None,
        stand_in=request.stand_in,
        tokens=ProbeTokens(
            kind=kind,
            n_sequences=n_sequences,
            n_tokens=sum(len(ids) for ids in sequences),
            seed=request.seed,
            sha256=digest,
            text=text,
        ),
        ids=tuple(tuple(int(i) for i in ids) for ids in sequences),
        names=names,
        carried=tuple(t.name for t in work.carried),
        fingerprint=passes.prepare(sequences),
        promise=promise,
        notes=tuple(notes),
        costs=costs,
    )


def _passes(
    depth: Depth, tensors: Sequence[TensorInfo], carried: Sequence[TensorInfo]
) -> list[TensorPass]:
    """Return all passes: those that end at a layer first, for all of them are needed."""
    return [*(layer_pass(depth, t) for t in carried), *map(TensorPass, tensors)]


def _between(carried: Sequence[object]) -> str:
    return "carried or interpolated" if carried else "interpolated"


@dataclass(frozen=True)
class _Work:
    """What may be read: sequences, and tensors in the order in which they tell most.

    carried are those whose effect on a layer is read, too.
    """

    n_sequences: int
    tensors: tuple[TensorInfo, ...]
    carried: tuple[TensorInfo, ...] = ()

    @property
    def expected_error(self) -> float:
        """The relative error of α."""
        read = READ_ERROR / math.sqrt(self.n_sequences)
        return math.hypot(read, CARRIED_ERROR) if self.carried else read


def _works(
    file: GGUFFile,
    tensors: Sequence[TensorInfo],
    most: int,
    passes: ForwardRunner,
    request: TokenRequest,
) -> list[_Work]:
    """Return what may be read on up to so many sequences, the least error first.

    All tensors; those of every STRIDE-th layer and what cannot be carried from there; then, on one
    sequence, those of ever fewer layers.
    """
    numbers = range(1, most + 1)
    strides = range(1, max(1, file.n_trunk_layers or 1) + 1)
    every, *fewer = (_strided(file, tensors, stride) for stride in strides)
    carried = tuple(t for t in every if is_carried(file, t))
    if not carried or not tells_errors(passes, Depth.of(file), carried[0], request):
        carried = ()
    works = [_Work(n, every) for n in numbers]
    if carried and len(fewer) >= STRIDE:
        apart = fewer[STRIDE - 2]
        left_out = {t.name for t in (*carried, *apart)}
        some = (*apart, *(t for t in every if t.name not in left_out))
        works += [_Work(n, some, carried) for n in numbers]
        fewer = fewer[STRIDE - 1 :]
    works.sort(key=lambda work: work.expected_error)
    return [*works, *(_Work(1, tensors, carried) for tensors in fewer)]


def _told(request: TokenRequest) -> tuple[TokenKind | Literal["several"], str | None]:
    """Return what the result says of the request's tokens: their kind, and the text or sources."""
    if request.sources:
        return "several", dataset_name(request.sources)
    return request.tokens, request.corpus.name if request.corpus else None


def _strided(file: GGUFFile, tensors: Sequence[TensorInfo], stride: int) -> tuple[TensorInfo, ...]:
    """Return the tensors outside of layers, and of every stride-th layer; both ends twice as dense.

    The first two and the last two layers are unlike the others, and are always measured. Draft
    blocks never are: the next token does not depend on them. Layers come in an order in which any
    first few are spread over the depth, in case that the time ends before.
    """
    n_layers = file.n_trunk_layers or 0
    by_layer: dict[int, list[TensorInfo]] = {}
    found = []
    for tensor in tensors:
        layer = layer_of(tensor.name)
        if layer is None:
            found.append(tensor)
        elif _is_read(layer, n_layers, stride):
            by_layer.setdefault(layer, []).append(tensor)
    layers = sorted(by_layer)
    ends = [*layers[:2], *layers[2:][-2:]] if len(layers) > 2 else layers
    between = layers[2:-2]
    for layer in (*ends, *(between[i] for i in spread_order(len(between)))):
        found += by_layer[layer]
    return tuple(found)


def _is_read(layer: int, n_layers: int, stride: int) -> bool:
    at_ends = layer < 2 or layer > n_layers - 3
    return layer < n_layers and (at_ends or (layer - 2) % stride == 0)


def _check_resumed(settings: Settings, file: GGUFFile, request: TokenRequest, path: Path) -> None:
    """Raise PlanError when the journal is of another model, encoder or choice of tokens."""
    same = (
        difference(file, settings.source) is None
        and (settings.encoder, settings.stand_in) == (request.encoder, request.stand_in)
        and _sha(settings.imatrix) == _sha(request.imatrix.source if request.imatrix else None)
        and (settings.tokens.kind, settings.tokens.text) == _told(request)
        and settings.tokens.seed == request.seed
        and request.n_sequences in (None, settings.tokens.n_sequences)
        and {len(ids) for ids in settings.ids} == {request.n_ctx}
    )
    if not same:
        raise PlanError(
            f"{path} is of another model, encoder, imatrix, stand-in or choice of tokens; "
            "remove it to start anew"
        )


def _sha(imatrix: ImportanceSource | None) -> str | None:
    return None if imatrix is None else imatrix.identity


DEFAULT_SECONDS = 1200.0


def sensitivity(
    model: str | Path,
    *,
    tokens: str = "self",
    encoder: EncoderName = "search",
    imatrix: str | Path | None = None,
    hessian: str | Path | None = None,
    n_sequences: int | None = None,
    n_ctx: int = N_CTX,
    seed: int = 0,
    seconds: float = DEFAULT_SECONDS,
    journal: str | Path | None = None,
    folder: str | Path | None = None,
    stand_in: StandIn = "auto",
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Sensitivity:
    """Return how much the error of each of the model's tensors changes its output.

    encoder, imatrix and hessian are those that the model will be quantized with, as in quantize.
    tokens is self (drawn from the model), mix (the package's texts of several domains), random,
    wikitext, a text file, or several of these with weights: self,mix,FILE:2. They are read in
    sequences of n_ctx, and sources take turns, so that one sequence is of the weightiest.
    n_sequences None takes as many, up to four, as fit the seconds, of the whole call; with a
    number, all tensors are measured and two runs agree exactly. journal keeps every reading, and a
    run that was killed goes on from it; folder takes a copy of the model meanwhile, by default the
    system's temporary folder. announce gets what will be done, and for how long.

    stand_in is what the passes run on: auto and none are the model, which is read from the disk
    where it does not fit the memory; q8_0 or q6_k a quick quantization of it, whose kernels round
    activations: what that changes drowns the KLD of one tensor (docs/calibration.md).

    With an executor, the passes run on its workers (docs/scale.md), with `threads` threads each;
    folder is then theirs. Equal kernels and threads give equal numbers.

    Raises GGUFError, ImatrixError, PlanError for a model or journal that does not suit,
    EngineError when llama.cpp is missing or fails.
    """
    with open_gguf(local_path(model), kind_check=True) as file:
        form = chosen_stand_in("none" if stand_in == "auto" else stand_in, file, allowed=FINE)
        request = TokenRequest(
            encoder=encoder,
            n_sequences=n_sequences,
            n_ctx=n_ctx,
            seed=seed,
            seconds=seconds,
            imatrix=load_importance(imatrix, hessian, encoder),
            stand_in=form,
        )
        request = of_sources(request, tokens, file)
    timer = Timer(seconds)
    with opened(
        model, request, folder=folder, journal=journal, threads=threads, executor=executor
    ) as at:
        return measure_alpha(
            at.file,
            request,
            at.opening,
            journal_path=at.journal,
            progress=progress or Silent(),
            announce=announce,
            timer=timer,
        )
