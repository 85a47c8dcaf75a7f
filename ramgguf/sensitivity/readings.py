"""All readings of a run, in the order that takes the least time, as far as the time reaches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from ramgguf.core.errors import EngineError
from ramgguf.core.progress import Progress
from ramgguf.gguf.architecture import layer_of
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.llama.forward import ForwardRequest, ForwardResult, ForwardRunner
from ramgguf.llama.token_statistics import standard_error
from ramgguf.quants import formats
from ramgguf.sensitivity.journal import Journal, Settings
from ramgguf.sensitivity.result import FIRST_TOKENS, LayerReading, Reading
from ramgguf.sensitivity.starts import Depth, Starts, TensorPass
from ramgguf.sensitivity.timing import Costs, Timer

# The first that suits a tensor's rows is its probe: 4-bit errors are where plans are made.
PROBE_FORMATS = ("Q4_K", "Q4_0")
_LATELY = 8  # parts that were read


def probe_format(tensor: TensorInfo) -> str:
    """Return the format in which the tensor's sensitivity is read."""
    return next(f for f in PROBE_FORMATS if formats.suits(f, tensor.row_length))


def read_all(
    file: GGUFFile,
    wanted: Sequence[TensorPass],
    passes: ForwardRunner,
    settings: Settings,
    journal: Journal,
    *,
    progress: Progress,
    announce: Callable[[str], None],
    timer: Timer | None,
) -> None:
    """Add to the journal what the tensors' quantizations do to the output or a layer, one by one.

    wanted come in the order in which they tell most. They are read by the layer at which their
    passes begin; with a timer, of those as far down the order as the time reaches, one at least,
    and the layers at both ends first: no others tell of them.
    """
    n = len(settings.sequences)
    costs = replace(settings.costs or Costs(0.0, 1.0, 0.0), reload=passes.reload_seconds)
    whole, layers = journal.readings, journal.layer_readings
    left = [t for t in wanted if t.tensor.name not in (whole if t.end is None else layers)]
    depth = Depth.of(file)
    starts = Starts.planned(depth, costs, n, left)
    shown = _Shown(progress, costs)
    # Of several workers none should wait for another, so they get some readings at a time.
    step = max(1, len(left))
    if timer is not None:
        step = 1 if passes.n_workers == 1 else 4 * passes.n_workers
    pace, at = _Pace(), 0
    ends = _ends(wanted) if timer is not None else frozenset()
    shown.start(Starts.planned(depth, costs, n, wanted), wanted, left)

    def order(one: TensorPass) -> tuple[int, int, bool]:
        # What a layer puts out is kept of one layer at a time.
        return starts.start(one.tensor), depth.first(one.tensor), one.end is None

    try:
        while left:
            fitting = left
            if timer is not None and pace.is_told:
                # The last pass, which shows that the copy is whole, has to follow.
                seconds = starts.seconds(left, at)
                in_time = (timer.has_time(pace.slower * (s + starts.last)) for s in seconds)
                fitting = [one for one, fits in zip(left, in_time, strict=True) if fits]
            if not fitting:
                return
            now = [one for one in fitting if one in ends] or fitting
            ahead = [one for one in now if starts.start(one.tensor) >= at] or now
            part = sorted(ahead, key=order)[:step]
            asked = [
                ForwardRequest(
                    ((one.tensor.name, probe_format(one.tensor)),),
                    settings.sequences,
                    starts.start(one.tensor),
                    one.end,
                )
                for one in part
            ]
            expected, begun = starts.seconds(part, at)[-1], timer.spent if timer else 0.0
            at, why_whole = asked[-1].start, None
            for position, found in passes.run(asked):
                file.require_unchanged()
                journal.add(_reading(part[position], found, n))
                shown.advance(part[position])
                why_whole = why_whole or found.why_whole
            if timer is not None:
                pace.add(timer.spent - begun, expected)
            done = set(part)
            left = [one for one in left if one not in done]
            if why_whole is not None and len(starts.layers) > 1:
                announce(f"passes begin at the first layer: {why_whole}")
                starts, at = Starts(depth, costs, n), 0
                shown.start(starts, wanted, left)
    finally:
        progress.finish()


def _ends(wanted: Sequence[TensorPass]) -> frozenset[TensorPass]:
    """Return the whole passes of tensors outside of layers, and in the first and last two."""
    whole = [one for one in wanted if one.end is None]
    layers = sorted({layer for one in whole if (layer := layer_of(one.tensor.name)) is not None})
    ends = {None, *layers[:2], *layers[-2:]}
    return frozenset(one for one in whole if layer_of(one.tensor.name) in ends)


def _reading(one: TensorPass, found: ForwardResult, n_sequences: int) -> Reading | LayerReading:
    name, format_name = one.tensor.name, probe_format(one.tensor)
    if one.end is not None:
        error = math.nan if found.errors is None else float(found.errors.mean())
        if not math.isfinite(error):
            raise EngineError(f"{name} as {format_name}: layer {one.end} puts out no finite values")
        return LayerReading(
            name=name, format=format_name, nmse=found.nmse[0], layer=one.end, error=error
        )
    late = found.kld.reshape(n_sequences, -1)[:, FIRST_TOKENS:]
    return Reading(
        name=name,
        format=format_name,
        nmse=found.nmse[0],
        kld=max(0.0, float(found.kld.mean())),
        standard_error=standard_error(found.kld),
        late_kld=max(0.0, float(late.mean())) if late.size else None,
    )


class _Pace:
    """How much slower readings are than the probe said: in all, or lately, where that is more.

    What is left is read by depth, so that a machine that gets slower must be noticed at once.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[float, float]] = []

    @property
    def is_told(self) -> bool:
        """Whether anything was read."""
        return any(expected > 0 for _, expected in self._parts)

    @property
    def slower(self) -> float:
        """Seconds over those expected."""
        return max(_ratio(self._parts), _ratio(self._parts[-_LATELY:]))

    def add(self, seconds: float, expected: float) -> None:
        """Count a part that was read."""
        self._parts.append((seconds, expected))


def _ratio(parts: Sequence[tuple[float, float]]) -> float:
    expected = sum(part[1] for part in parts)
    return sum(part[0] for part in parts) / expected if expected > 0 else 0.0


class _Shown:
    """Progress in passes over a sequence by the whole model: those that begin later count less."""

    def __init__(self, progress: Progress, costs: Costs) -> None:
        self._progress = progress
        self._second = costs.n_workers / costs.each if costs.each > 0 else 1.0  # in passes
        self._done, self._shown = 0.0, 0

    def start(
        self, starts: Starts, wanted: Sequence[TensorPass], left: Sequence[TensorPass]
    ) -> None:
        """Begin with what is done of the wanted tensors."""
        self._starts = starts
        to_do = set(left)
        self._done, self._shown = 0.0, 0
        total = self._second * sum(map(starts.reading, wanted))
        self._progress.start("sensitivity", max(1, round(total)), "passes")
        for one in wanted:
            if one not in to_do:
                self.advance(one)

    def advance(self, one: TensorPass) -> None:
        """Count a reading."""
        self._done += self._second * self._starts.reading(one)
        before, self._shown = self._shown, round(self._done)
        self._progress.advance(self._shown - before)
