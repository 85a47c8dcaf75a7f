"""From a model and a limit to a file: measure, plan, refine, feed back, write, verify."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ramgguf.core.errors import PlanError
from ramgguf.core.inputs import protected
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Clock, Progress, Silent, followed_by
from ramgguf.core.version import __version__
from ramgguf.evaluate import DraftAgreement, HeldOutScore
from ramgguf.gguf.hub import beside, local_path
from ramgguf.gguf.identity import require_model
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.measure import measure_file
from ramgguf.measure.result import Measurement
from ramgguf.plan import PlanOptions, SizeLimit, SourceSize, size_limit
from ramgguf.plan.result import Pin, Plan
from ramgguf.quantize.feedback import fed_back, first_measure
from ramgguf.quantize.kept_blocks import KeptBlocks
from ramgguf.quantize.output_paths import check_destination, default_output, refuse_shard_name
from ramgguf.quantize.preselection import MANY_WEIGHTS, measure_and_plan
from ramgguf.quantize.shard_plans import plan_for_shards
from ramgguf.quantize.verify import verify as verify_file
from ramgguf.quantize.write import Before, Destination, begin, settled, write
from ramgguf.quants.encoders import DEFAULT_ENCODER, ENCODERS, EncoderName
from ramgguf.quants.formats import ON_REQUEST, SOURCES_ONLY, expand
from ramgguf.quants.imatrix import load_importance
from ramgguf.quants.output_metadata import overhead_bytes
from ramgguf.quants.scales import with_scales
from ramgguf.refine import refine as refine_plan
from ramgguf.refine import refinement_journal

NOT_CORRECTED = (
    "weights are not corrected for quantized inputs again: the plan has formats and encoder, and "
    "only a run of the effort has the layers' outputs"
)


@dataclass(frozen=True)
class Quantized:
    """What `quantize` made: the files, the plan they follow and the seconds of each stage.

    measurement is None when the plan was given, and may lack formats that a sample of a tensor
    showed not to be worth their bytes. worst_departure is the largest relative difference between
    planned and written NMSE, None when the output was not verified. score is on held-out text,
    None where none was asked for, or llama.cpp could not score. modelfile is for the target ollama.
    mmproj is the vision projector that was planned together with the model; draft says how often a
    draft model that runs beside it agrees with it, and is measured with the score.
    """

    paths: tuple[Path, ...]
    n_bytes: int
    plan: Plan
    measurement: Measurement | None
    worst_departure: float | None
    seconds: dict[str, float]
    score: HeldOutScore | None = None
    modelfile: Path | None = None
    mmproj: "Quantized | None" = None
    draft: DraftAgreement | None = None


@dataclass(frozen=True)
class QuantizeOptions:
    """How a file is made, whatever its size: the options of `quantize`, which explains them."""

    encoder: EncoderName = DEFAULT_ENCODER
    imatrix: str | Path | None = None
    hessian: str | Path | None = None
    scales: str | Path | None = None
    allow_requantize: bool = False
    refine: int = 0
    refine_beside: Path | None = None  # what the journal of a refinement is kept beside
    split_max_bytes: int | None = None
    in_one_file: bool = False  # though it is planned for shards: what is written is no output yet
    force: bool = False
    verify: bool = True
    threads: int | None = None
    executor: Executor | None = None
    progress: Progress | None = None
    announce: Callable[[str], None] = lambda _: None
    kept_blocks: Path | None = None  # where error feedback keeps what it has encoded
    before: Quantized | None = None  # of this model, in one file: what comes out alike is copied
    plan: PlanOptions = field(default_factory=PlanOptions)

    @property
    def splits(self) -> bool:
        """Whether shards are written."""
        return self.split_max_bytes is not None and not self.in_one_file


@protected()
def quantize_once(
    model: str | Path,
    budget: int | str | SizeLimit | None = None,
    output: str | Path | None = None,
    options: QuantizeOptions | None = None,
    *,
    from_plan: Plan | None = None,
    measurement: Measurement | None = None,
) -> Quantized:
    """Write what these options say and return what was made (quantization.quantize)."""
    if (budget is None) == (from_plan is None):
        raise PlanError("either a budget, memory or a plan is needed: give one of them")
    model = local_path(model)
    options = options or QuantizeOptions()
    with open_gguf(model, kind_check=True, or_projector=True) as plain:
        file = as_planned(plain, from_plan) if from_plan else with_scales(plain, options.scales)
        output = None if output is None else Path(output)
        if output is not None:
            refuse_shard_name(output)
        run = _Run(model, file, output, options)
        if from_plan is not None:
            if from_plan.quantized_inputs is None or options.before is not None:
                return run.written(from_plan, None)
            options.announce(NOT_CORRECTED)
            plain_plan = from_plan.model_copy(update={"quantized_inputs": None})
            return run.written(plain_plan, None, measures=True)
        assert budget is not None
        measurement, plan = run.planned(size_limit(budget), measurement)
        plan, journal = run.refined(plan, measurement)
        plan = run.fed_back(plan)
        made = run.written(plan, measurement)
    if journal is not None:
        journal.unlink(missing_ok=True)
    return made


def as_planned(file: GGUFFile, plan: Plan) -> GGUFFile:
    """Return the model as the plan encodes it: with its scales, if there are any."""
    return with_scales(file, plan.imatrix.scales_path if plan.imatrix else None)


def measured_formats(options: PlanOptions) -> tuple[str, ...] | None:
    """Return the formats to measure: those asked for, and those of pins; None for the default."""
    pinned = {Pin.parse(pin).format for pin in options.get("pins", ())} - set(SOURCES_ONLY)
    names = options.get("formats")
    if names is None:
        if unasked := sorted(pinned & set(ON_REQUEST)):
            raise PlanError(
                f"{unasked[0]} is measured on request only: name the formats of all tensors, too, "
                f"as in --formats k --pin REGEX={unasked[0]}"
            )
        return None
    return expand((*names, *sorted(pinned)))


class _Run:
    """One run of `quantize`: its options, and the time of each of its stages."""

    def __init__(
        self, model: Path, file: GGUFFile, output: Path | None, options: QuantizeOptions
    ) -> None:
        self._model, self._file, self._output = model, file, output
        self._options, self._encoder = options, ENCODERS[options.encoder]
        self._threads = options.threads or default_threads()
        self._progress = options.progress or Silent()
        self._clock = Clock()
        self._feed_back: Callable[[Plan], Plan] | None = None

    def planned(
        self, limit: SizeLimit, measurement: Measurement | None
    ) -> tuple[Measurement, Plan]:
        """Return the plan that keeps to the limit, and what was measured for it."""
        options = self._options
        with ExitStack() as stack:
            room = stack.enter_context(limit.room(SourceSize.of(self._file)))
            wanted = self._output or beside(self._model, self._model.name)
            most = min(room.n_bytes, self._file.n_bytes)  # a budget may be more than the source
            check_destination(wanted, self._output is not None and not options.force, most)
            shards = partial(plan_for_shards, self._file, options.plan, options.split_max_bytes)

            def plan_it(measured: Measurement) -> Plan:
                return room.plan(partial(shards, measured))

            if measurement is not None:
                require_model("the measurement", measurement.source, self._file)
                with self._clock.stage("plan"):
                    return measurement, plan_it(measurement)
            weighed = load_importance(
                options.imatrix, options.hessian, options.encoder, options.scales
            )
            measure = partial(
                measure_file,
                self._file,
                n_overhead_bytes=overhead_bytes(self._file, weighed.source if weighed else None),
                allow_requantize=options.allow_requantize,
                threads=self._threads,
                progress=self._progress,
            )
            if self._encoder.plans_by:
                self._feed_back = partial(fed_back, encoder=self._encoder, imatrix=weighed)
            stack.enter_context(followed_by(self._progress, "quantize"))
            return measure_and_plan(
                first_measure(measure, self._encoder, weighed, measured_formats(options.plan)),
                plan_it,
                options.plan,
                self._clock.stage,
                preselects=self._file.n_weights >= MANY_WEIGHTS,
                alternatives=options.refine > 0,
            )

    def refined(self, plan: Plan, measurement: Measurement) -> tuple[Plan, Path | None]:
        """Return the plan after trials of swaps, if asked for, and the journal of these trials."""
        options = self._options
        if not options.refine:
            return plan, None
        wanted = options.refine_beside or self._output or beside(self._model, self._model.name)
        journal = refinement_journal(wanted, plan)
        with self._clock.stage("refine"):
            plan = refine_plan(
                self._model,
                plan,
                measurement,
                n_trials=options.refine,
                sensitivity=options.plan.get("sensitivity"),
                imatrix=options.imatrix,
                journal=journal,
                threads=self._threads,
                executor=options.executor,
                progress=self._progress,
                announce=options.announce,
            )
        return plan, journal

    def fed_back(self, plan: Plan) -> Plan:
        """Return the plan for the encoder itself, where another one's errors chose its formats."""
        return plan if self._feed_back is None else self._feed_back(plan)

    def _followed_by_verify(self) -> AbstractContextManager[None]:
        return followed_by(self._progress, "verify") if self._options.verify else nullcontext()

    @contextmanager
    def _before(self) -> Iterator[Before | None]:
        made = self._options.before
        if made is None:
            yield None
            return
        with open_gguf(made.paths[0]) as file:
            yield Before(made.plan, file)

    def _kept(self, plan: Plan) -> AbstractContextManager[KeptBlocks | None]:
        """Return what a killed run of the same plan has encoded, if errors are fed back."""
        path = self._options.kept_blocks
        if path is None or self._feed_back is None or self._options.before is not None:
            return nullcontext()
        return KeptBlocks(path, f"{__version__} {self._file.sample_sha256} {plan.sha256()}")

    def written(
        self, plan: Plan, measurement: Measurement | None, *, measures: bool = False
    ) -> Quantized:
        """Write and verify the planned output; its errors are measured after error feedback, or
        if it measures.
        """
        path = self._output or default_output(self._model, plan)
        options = self._options
        destination = Destination(
            path, options.force, options.split_max_bytes if options.splits else None
        )
        plan = settled(self._file, plan, destination)
        clock, shown = self._clock, self._progress
        worst = None
        with begin(self._file, plan, destination) as out:
            with (
                clock.stage("write"), self._followed_by_verify(), self._before() as before,
                self._kept(plan) as kept,
            ):  # fmt: skip
                plan = write(
                    self._file, plan, out, measures=measures or self._feed_back is not None,
                    before=before, kept=kept, threads=self._threads, progress=shown,
                )  # fmt: skip
            if options.verify:
                with clock.stage("verify"), out.written() as written:
                    worst = verify_file(
                        self._file, plan, written, threads=self._threads, progress=shown
                    )
            with clock.stage("flush"):
                paths = out.commit()
        n_written = sum(p.stat().st_size for p in paths)
        return Quantized(paths, n_written, plan, measurement, worst, clock.seconds)
