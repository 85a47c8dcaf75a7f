"""Quantize as well as the time allows: steps in order of what they bring, each one gated.

fast plans by priors and searches scales. auto adds what calibration brings: an importance matrix,
then error feedback (GPTQ) if its Hessians fit the time. best adds measured sensitivities and swaps
by forward passes. Each step writes a candidate; it replaces the one before only if its KLD on
held-out text of every domain says so. What a step has measured is kept beside the model.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

from ramgguf.calibrate import calibrate
from ramgguf.core.errors import EngineError, GGUFError, PlanError
from ramgguf.core.files import refuse_existing
from ramgguf.core.inputs import protected
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.scratch import scratch_folder
from ramgguf.core.units import format_bytes, format_seconds
from ramgguf.evaluate import SCORE_SECONDS, HeldOutScore, score_held_out
from ramgguf.gguf.architecture import layer_of, never_quantized
from ramgguf.gguf.hub import beside, local_path
from ramgguf.gguf.identity import FileIdentity
from ramgguf.gguf.reader import GGUFFile, TensorInfo, open_gguf
from ramgguf.llama.system import llama_installed
from ramgguf.measure.result import Measurement
from ramgguf.plan import PlanOptions, SizeLimit, size_limit
from ramgguf.plan.result import Plan
from ramgguf.quantize.gate import Verdict, judge
from ramgguf.quantize.output_paths import default_output
from ramgguf.quantize.pipeline import Quantized, quantize_once
from ramgguf.quants import formats
from ramgguf.quants.encoders import DEFAULT_ENCODER, EncoderName
from ramgguf.quants.imatrix import load_importance
from ramgguf.quants.roundtrip import SOURCES, simulated
from ramgguf.sensitivity import sensitivity as measure_sensitivity
from ramgguf.sensitivity.result import Sensitivity

Effort = Literal["fast", "auto", "best"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)

AUTO_SECONDS = 300.0
N_CTX = 512
FEWEST, MOST = 8, 64  # sequences of a calibration
GATE_CTX = 256
GATE_SECONDS = 60.0
N_TRIALS = 32
TOKENS = "mix"
FEEDBACK_PROBE = "Q4_K"


@protected()
def quantize(
    model: str | Path,
    budget: int | str | SizeLimit | None = None,
    output: str | Path | None = None,
    *,
    effort: Effort = "fast",
    seconds: float | None = None,
    score: bool = False,
    from_plan: Plan | None = None,
    measurement: Measurement | None = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    imatrix: str | Path | None = None,
    hessian: str | Path | None = None,
    allow_requantize: bool = False,
    refine: int = 0,
    split_max_bytes: int | None = None,
    force: bool = False,
    verify: bool = True,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
    **options: Unpack[PlanOptions],
) -> Quantized:
    """Write the best GGUF that keeps to the budget and return what was made.

    Needs a budget (bytes, text such as 16GB, 4.5bpw or 30%, or a SizeLimit) or a ready plan. A
    ready measurement saves measuring again. options are those of plan; imatrix and hessian are as
    in measure. Without a ready plan, refine is how many swaps of formats are tried by forward
    passes, on the workers of an executor if there is one; announce gets their cost. An encoder that
    plans by another one's errors (gptq by those of search) chooses formats by these, if there is no
    ready plan or measurement; a sensitivity must suit these: without Hessians. output is by default
    beside the model and named after the plan's bits per weight.

    effort auto or best decides all of this itself, within the seconds (default: auto takes about
    five minutes, or as long as quantizing itself; best what it needs): then none of these may be
    given. With score, what was written is scored on held-out text of several domains.
    Raises RamggufError; an older output is then untouched.
    """
    model = local_path(model)
    common: dict[str, Any] = {
        "allow_requantize": allow_requantize,
        "threads": threads,
        "progress": progress,
        "announce": announce,
    }
    explicit = {
        "from_plan": from_plan, "measurement": measurement, "imatrix": imatrix,
        "hessian": hessian, "refine": refine or None, "sensitivity": options.get("sensitivity"),
        "encoder": None if encoder == DEFAULT_ENCODER else encoder,
    }  # fmt: skip
    if effort not in EFFORTS:
        raise PlanError(f"effort {effort!r} is none of {', '.join(EFFORTS)}")
    if effort == "fast":
        made = quantize_once(
            model, budget, output, from_plan=from_plan, measurement=measurement, encoder=encoder,
            imatrix=imatrix, hessian=hessian, refine=refine, split_max_bytes=split_max_bytes,
            force=force, verify=verify, executor=executor, **common, **options,
        )  # fmt: skip
    else:
        if given := [name for name, value in explicit.items() if value is not None]:
            raise PlanError(
                f"effort {effort} decides by itself what it uses, and {', '.join(given)} was given"
            )
        if budget is None:
            raise PlanError("a budget is needed")
        run = _Run(
            model, size_limit(budget), None if output is None else Path(output), effort, seconds,
            split_max_bytes=split_max_bytes, force=force, verify=verify, options=options, **common,
        )  # fmt: skip
        made = run.made()
    if not score:
        return made
    return replace(made, score=scored(made, model, threads, progress, announce))


def scored(
    made: Quantized,
    model: Path,
    threads: int | None,
    progress: Progress | None,
    announce: Callable[[str], None],
) -> HeldOutScore | None:
    """Return the score of what was written; None, and a line, where llama.cpp cannot score it."""
    try:
        (found,) = score_held_out(
            made.paths[:1], model, seconds=SCORE_SECONDS, threads=threads, progress=progress
        )
    except EngineError as e:
        announce(f"not scored: {e}")
        return None
    return found


@dataclass(frozen=True)
class Recipe:
    """How a candidate is made."""

    encoder: EncoderName = DEFAULT_ENCODER
    imatrix: Path | None = None
    hessian: Path | None = None
    sensitivity: Sensitivity | None = None
    refine: int = 0


@dataclass(frozen=True)
class Step:
    """A step that is planned: its name, what it does, and how long that is expected to take."""

    name: str
    what: str
    seconds: float


@dataclass
class Costs:
    """What was measured on this model and machine, in seconds.

    write is a candidate by priors, from measuring to verifying; read a sequence of N_CTX tokens
    under the tap; feedback GPTQ's sweep over all weights; hessian_bytes what their Hessians take.
    """

    write: float
    read: float
    feedback: float
    hessian_bytes: int


class _Stopwatch:
    """Progress that also adds up the seconds of each stage."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self.seconds: dict[str, float] = {}
        self._stage, self._start = "", 0.0

    def start(self, stage: str, total: int, unit: str) -> None:
        self._stage, self._start = stage, time.perf_counter()
        self._shown.start(stage, total, unit)

    def advance(self, amount: int) -> None:
        self._shown.advance(amount)

    def finish(self) -> None:
        spent = time.perf_counter() - self._start
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + spent
        self._shown.finish()


@dataclass
class _Candidate:
    """A file in the scratch folder, and what made it."""

    recipe: Recipe
    made: Quantized

    @property
    def path(self) -> Path:
        return self.made.paths[0]


@dataclass
class _Log:
    """What became of each step, for the terminal and for the plan's notes."""

    announce: Callable[[str], None]
    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line)
        self.announce(line)


class _Run:
    """One run of effort auto or best."""

    def __init__(
        self,
        model: Path,
        limit: SizeLimit,
        output: Path | None,
        effort: Effort,
        seconds: float | None,
        *,
        split_max_bytes: int | None,
        force: bool,
        verify: bool,
        options: PlanOptions,
        allow_requantize: bool,
        threads: int | None,
        progress: Progress | None,
        announce: Callable[[str], None],
    ) -> None:
        self._model, self._limit, self._output = model, limit, output
        self._effort, self._seconds = effort, seconds
        self._split_max_bytes, self._force, self._verify = split_max_bytes, force, verify
        self._options, self._allow_requantize = options, allow_requantize
        self._threads, self._progress = threads, progress or Silent()
        self._announce, self._log = announce, _Log(announce)
        self._start = time.perf_counter()
        self._n_candidates = 0

    def made(self) -> Quantized:
        """Return what was made: the best candidate, under its final name."""
        if self._output is not None and not self._force:
            refuse_existing(self._output, force=False, error=GGUFError)
        if not llama_installed():
            self._announce(
                f"effort {self._effort} needs llama.cpp and is fast without: no calibration, no "
                "gate, no score; pip install 'ramgguf[eval]'"
            )
            return self._once(Recipe(), self._output)
        folder = (self._output or beside(self._model, "output")).absolute().parent
        with scratch_folder(folder, error=GGUFError) as scratch:
            self._scratch = scratch
            best = self._candidate(Recipe())
            try:
                best = self._improved(best)
            except EngineError as e:
                self._log.add(f"effort ends here, with what was made so far: {e}")
            return self._finished(best)

    def _improved(self, best: _Candidate) -> _Candidate:
        """Return the best candidate after the steps that fit the time and pass the gate."""
        self._write = time.perf_counter() - self._start
        limit = self._time_limit()
        with open_gguf(self._model) as file:
            costs = self._probe(file)
            self._cache = Cache.of(file, self._model)
        steps = list(self._steps(costs, limit))
        whole = sum(step.seconds for step in steps)
        self._announce(
            f"effort {self._effort}: {len(steps)} steps, about {format_seconds(whole)}"
            + (f" of at most {format_seconds(limit)}" if limit < 1e9 else "")
        )
        for number, step in enumerate(steps, 1):
            self._announce(
                f"  {number}. {step.name}: {step.what}, about {format_seconds(step.seconds)}"
            )
        for step in steps:
            tried = self._tried(step, best, costs)
            if tried is None:
                continue
            verdict = self._verdict(best, tried)
            self._log.add(f"{step.name}: {verdict}")
            worse, best = (best, tried) if verdict.taken else (tried, best)
            worse.path.unlink(missing_ok=True)
        return best

    def _time_limit(self) -> float:
        """Return the seconds that all steps together may take."""
        if self._seconds is not None:
            return self._seconds
        return max(AUTO_SECONDS, self._write) if self._effort == "auto" else 1e9

    # --- what it costs ---

    def _probe(self, file: GGUFFile) -> Costs:
        """Return what reading and error feedback cost here: measured on one layer of the model."""
        weights = [t for t in file.tensors if _is_weight(file, t)]
        layers = sorted({layer for t in weights if (layer := layer_of(t.name)) is not None})
        middle = layers[len(layers) // 2] if layers else 0
        probed = [t for t in weights if layer_of(t.name) == middle] or weights[:1]
        pattern = "^(" + "|".join(re.escape(t.name) for t in probed) + ")$"
        watch = _Stopwatch(Silent())
        imatrix, hessian = (self._scratch / f"probe.{name}.gguf" for name in ("imatrix", "hessian"))
        began = time.perf_counter()
        calibrate(
            self._model, imatrix, tokens=TOKENS, n_sequences=1, n_ctx=N_CTX, hessian=hessian,
            hessian_pattern=pattern, force=True, threads=self._threads, progress=watch,
        )  # fmt: skip
        read = watch.seconds.get("calibrate", time.perf_counter() - began)
        hessian_bytes = hessian.stat().st_size * max(1, len(layers))
        weighed = load_importance(imatrix, hessian, "gptq")
        began, n_swept = time.perf_counter(), 0
        for tensor in probed:
            form = next(f for f in (FEEDBACK_PROBE, "Q4_0") if formats.suits(f, tensor.row_length))
            with suppress(EngineError, ValueError):
                simulated(
                    file, tensor, form, encoder="gptq", imatrix=weighed,
                    threads=self._threads or default_threads(),
                )  # fmt: skip
                n_swept += tensor.n_weights
        swept = (time.perf_counter() - began) / max(1, n_swept)
        for path in (imatrix, hessian):
            path.unlink(missing_ok=True)
        return Costs(self._write, read, swept * sum(t.n_weights for t in weights), hessian_bytes)

    def _steps(self, costs: Costs, limit: float) -> Iterator[Step]:
        """Yield the steps that fit the time, in the order of what they bring per second.

        The matrix comes first: the others build on it, and it brings most per second.
        """
        gate = min(GATE_SECONDS, 0.1 * limit)
        left = limit
        self._n_sequences = int(min(MOST, max(FEWEST, 0.3 * left / costs.read)))
        kept = self._cache.matrix(self._n_sequences)
        reading = 0.0 if kept else self._n_sequences * costs.read
        matrix = Step(
            "importance matrix",
            f"from {self._n_sequences} × {N_CTX} tokens ({TOKENS})",
            reading + costs.write + gate,
        )
        if matrix.seconds > left:
            self._log.add(
                f"importance matrix: left out, about {format_seconds(matrix.seconds)} of "
                f"{format_seconds(left)}; give more with --time"
            )
            return
        yield matrix
        left -= matrix.seconds
        if self._effort == "best":
            seconds = min(1200.0, 0.4 * left)
            yield Step(
                "sensitivities",
                "every tensor's, by forward passes",
                (0.0 if self._cache.sensitivity.exists() else seconds) + costs.write + gate,
            )
            self._sensitivity_seconds = seconds
            left -= seconds + costs.write + gate
        feedback = Step(
            "error feedback",
            f"GPTQ, with Hessians of {format_bytes(costs.hessian_bytes)}",
            # The Hessians take one more reading; errors are measured, then blocks are written.
            reading + 2 * costs.feedback + costs.write + gate,
        )
        room = self._cache.free_bytes()
        if feedback.seconds <= left and costs.hessian_bytes < 0.5 * room:
            yield feedback
            left -= feedback.seconds
        else:
            short = (
                f"about {format_seconds(feedback.seconds)} of {format_seconds(max(0.0, left))}"
                if feedback.seconds > left
                else f"its Hessians take {format_bytes(costs.hessian_bytes)} of disk"
            )
            self._log.add(f"error feedback: left out, {short}")
        swaps = Step(
            "swaps",
            f"{N_TRIALS} tried by forward passes",
            (3 * N_TRIALS + 24) * costs.read + costs.write + gate,
        )
        if self._effort == "best" and swaps.seconds <= left:
            yield swaps

    # --- the steps ---

    def _tried(self, step: Step, best: _Candidate, costs: Costs) -> _Candidate | None:
        """Return the candidate of a step; None where it builds on a step that was not taken."""
        now = best.recipe
        match step.name:
            case "importance matrix":
                return self._candidate(replace(now, imatrix=self._matrix()))
            case "sensitivities":
                return self._candidate(replace(now, sensitivity=self._sensitivity(now)))
            case "error feedback" if now.imatrix is not None:
                hessian = self._hessian(now.imatrix)
                return self._candidate(replace(now, encoder="gptq", hessian=hessian))
            case "swaps":
                return self._candidate(replace(now, refine=N_TRIALS))
        self._log.add(f"{step.name}: left out, it builds on a matrix that was not taken")
        return None

    def _matrix(self) -> Path:
        """Return the importance matrix, made now or before."""
        kept = self._cache.matrix(self._n_sequences)
        if kept is not None:
            self._announce(f"taking {kept}")
            return kept
        return self._calibrated(self._cache.new_matrix(self._n_sequences), None)

    def _hessian(self, imatrix: Path) -> Path:
        """Return the Hessians that belong to the matrix, made now or before."""
        hessian = imatrix.with_name(imatrix.name.replace(".imatrix.", ".hessian."))
        if hessian.exists():
            self._announce(f"taking {hessian}")
            return hessian
        again = self._scratch / "again.imatrix.gguf"
        self._calibrated(again, hessian)
        return hessian

    def _calibrated(self, imatrix: Path, hessian: Path | None) -> Path:
        calibrate(
            self._model, imatrix, tokens=TOKENS, n_sequences=self._n_sequences, n_ctx=N_CTX,
            hessian=hessian, force=True, threads=self._threads, progress=self._progress,
        )  # fmt: skip
        return imatrix

    def _sensitivity(self, now: Recipe) -> Sensitivity:
        """Return the sensitivities under the recipe's matrix, measured now or before."""
        path = self._cache.sensitivity
        weighed = load_importance(now.imatrix, None)
        if path.exists():
            found = Sensitivity.load(path)
            same = (found.imatrix.identity if found.imatrix else None) == (
                weighed.source.identity if weighed else None
            )
            if same:
                self._announce(f"taking {path}")
                return found
        journal = path.with_name(f"{path.name}.partial")
        found = measure_sensitivity(
            self._model, encoder=DEFAULT_ENCODER, imatrix=now.imatrix,
            seconds=self._sensitivity_seconds, journal=journal, threads=self._threads,
            progress=self._progress, announce=self._announce,
        )  # fmt: skip
        found.save(path)
        journal.unlink(missing_ok=True)
        return found

    def _candidate(self, recipe: Recipe) -> _Candidate:
        """Write the file of a recipe into the scratch folder."""
        self._n_candidates += 1
        path = self._scratch / f"candidate-{self._n_candidates}.gguf"
        return _Candidate(recipe, self._once(recipe, path, split=None))

    def _once(self, recipe: Recipe, output: Path | None, **changes: Any) -> Quantized:
        split = changes.get("split", self._split_max_bytes)
        options: PlanOptions = {**self._options}
        if recipe.sensitivity is not None:
            options["sensitivity"] = recipe.sensitivity
        return quantize_once(
            self._model, self._limit, output, encoder=recipe.encoder, imatrix=recipe.imatrix,
            hessian=recipe.hessian, refine=recipe.refine, split_max_bytes=split,
            force=self._force, verify=self._verify, allow_requantize=self._allow_requantize,
            threads=self._threads, progress=self._progress, announce=self._announce, **options,
        )  # fmt: skip

    def _verdict(self, best: _Candidate, tried: _Candidate) -> Verdict:
        before, after = score_held_out(
            [best.path, tried.path], self._model, part="gate", n_ctx=GATE_CTX,
            seconds=GATE_SECONDS, threads=self._threads, progress=self._progress,
        )  # fmt: skip
        return judge(before, after)

    def _finished(self, best: _Candidate) -> Quantized:
        """Give the best candidate its name, or write it again where shards are asked for."""
        plan = best.made.plan
        notes = tuple(f"effort {self._effort}: {line}" for line in self._log.lines)
        plan = plan.model_copy(update={"notes": (*plan.notes, *notes)})
        path = self._output or default_output(self._model, plan)
        if self._split_max_bytes is not None:
            made = quantize_once(
                self._model, None, path, from_plan=plan, split_max_bytes=self._split_max_bytes,
                force=self._force, verify=self._verify, threads=self._threads,
                progress=self._progress,
            )  # fmt: skip
            made = replace(made, measurement=best.made.measurement)
        else:
            refuse_existing(path, force=self._force, error=GGUFError)
            best.path.replace(path)
            made = replace(best.made, paths=(path,), plan=plan)
        seconds = {"effort": time.perf_counter() - self._start}
        return replace(made, plan=plan, seconds=seconds)


def _is_weight(file: GGUFFile, tensor: TensorInfo) -> bool:
    return (
        tensor.type_name in SOURCES
        and never_quantized(tensor.name, tensor.shape, file.architecture) is None
        and any(formats.suits(f, tensor.row_length) for f in (FEEDBACK_PROBE, "Q4_0"))
    )


@dataclass(frozen=True)
class Cache:
    """Where the steps' results are kept: beside the model, named after the model's own data."""

    folder: Path
    identity: str

    @classmethod
    def of(cls, file: GGUFFile, model: Path) -> "Cache":
        """Return the cache of the model in the file; the folder is made."""
        found = FileIdentity.of(file)
        text = f"{found.n_bytes} {found.header_sha256} {found.sample_sha256}"
        folder = beside(model, f"{model.name.removesuffix('.gguf')}.effort")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise GGUFError(f"{folder}: cannot be made: {e.strerror}") from None
        return cls(folder, hashlib.sha256(text.encode()).hexdigest()[:12])

    def matrix(self, n_sequences: int) -> Path | None:
        """Return the matrix from most tokens, if it has at least so many sequences."""
        found: dict[int, Path] = {}
        for path in self.folder.glob(f"{TOKENS}-*x{N_CTX}-{self.identity}.imatrix.gguf"):
            count = path.name.split("-")[1].partition("x")[0]
            if count.isdigit():
                found[int(count)] = path
        best = max(found, default=0)
        return found[best] if best >= n_sequences else None

    def new_matrix(self, n_sequences: int) -> Path:
        """Return the path of a matrix from so many sequences."""
        return self.folder / f"{TOKENS}-{n_sequences}x{N_CTX}-{self.identity}.imatrix.gguf"

    @property
    def sensitivity(self) -> Path:
        """The path of the sensitivities."""
        return self.folder / f"{self.identity}.sens.json"

    def free_bytes(self) -> int:
        """Return what is left on the folder's disk."""
        import shutil

        return shutil.disk_usage(self.folder).free
