"""How fast llama.cpp computes with each format on this machine: measured once, then kept.

Generation waits for bytes, prompts for arithmetic, and both depend on kernels: they are timed on
made-up models of one format each, in turn with one reference, whose speed tells how busy the
machine is. What a layer takes without its weights is timed on a model that is all but empty.
"""

import hashlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from ramgguf.core.documents import Document, FrozenModel, NonNegativeFloat, Positive, PositiveFloat
from ramgguf.core.errors import EngineError, FormatError, PlanError
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.scratch import scratch_folder
from ramgguf.core.units import format_bytes, format_count
from ramgguf.core.user_cache import user_cache
from ramgguf.core.version import __version__
from ramgguf.llama.child import Child, ChildDiedError
from ramgguf.llama.protocol import SystemInfo
from ramgguf.llama.speed_model import SpeedModel
from ramgguf.llama.speed_protocol import Drop, Dropped, TimeTogether, Together
from ramgguf.llama.system import cpu_name, llama_installed
from ramgguf.llama.trial_protocol import Load, Loaded

REFERENCE = "Q8_0"
_WORKER = "ramgguf.llama.speed_worker"
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_EMPTY_WIDTH = 64
_EMPTY_LAYERS = 32
_LEAST_BYTES, _MOST_BYTES = 64 << 20, 512 << 20  # of a model's weights
_BEYOND_CACHE = 3  # times the last level's cache: weights are read from memory for every token


class FormatRate(FrozenModel):
    """Seconds that a weight of a format takes, for a token generated and a token of a prompt."""

    generation: PositiveFloat
    prompt: PositiveFloat


class SpeedProfile(Document):
    """The speed of formats on one machine, with a number of threads and one llama.cpp.

    rates are by format. reference_seconds is what the model of the reference format takes for a
    token generated, layer_seconds what a layer takes for it beside its weights; the _prompt_ ones
    are for a token of a prompt. refused are formats that llama.cpp cannot run, and why.
    """

    KIND: ClassVar[str] = "speeds"

    ramgguf_version: str
    cpu: str
    n_threads: Positive
    engine: str
    system: SystemInfo
    n_prompt: Positive
    n_rounds: Positive
    n_bytes: Positive
    reference_seconds: PositiveFloat
    reference_prompt_seconds: PositiveFloat
    layer_seconds: NonNegativeFloat
    layer_prompt_seconds: NonNegativeFloat
    rates: dict[str, FormatRate]
    refused: dict[str, str] = Field(default_factory=dict)

    @property
    def machine(self) -> str:
        """What was measured, in words."""
        return f"{format_count(self.n_threads, 'thread')} of {self.cpu}"


def format_speeds(
    names: Iterable[str],
    *,
    threads: int | None = None,
    announce: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
    n_bytes: int | None = None,
    width: int = 2048,
    n_prompt: int = 64,
    n_generated: int = 8,
    n_rounds: int = 3,
) -> SpeedProfile:
    """Return the speed of these formats here: what is not in the user's cache is measured.

    n_bytes is what a timed model's weights take, by default three times the largest cache, and
    width the length of its rows. Each format is kept as soon as it is measured. Raises EngineError
    without llama-cpp-python, or where it cannot run the models.
    """
    if not llama_installed():
        raise EngineError("the speed of formats is measured: pip install 'ramgguf[eval]'")
    threads = threads or default_threads()
    n_bytes = n_bytes or beyond_cache()
    path = _path(f"{threads}|{n_bytes}|{width}|{n_prompt}|{n_generated}|{n_rounds}")
    known = _kept(path)
    missing = [
        name
        for name in sorted({*names, "F16", "F32"})
        if known is None or not (name in known.rates or name in known.refused)
    ]
    if known is not None and not missing:
        return known
    announce(
        f"measuring how fast llama.cpp computes with {format_count(len(missing), 'format')} here, "
        f"on models of {format_bytes(n_bytes)} (beyond the CPU's caches) each; once, kept in {path}"
    )
    timing = TimeTogether(n_prompt=n_prompt, n_generated=n_generated, n_rounds=n_rounds)
    shown, found = progress or Silent(), known
    shown.start("time formats", len(missing), "formats")
    try:
        with scratch_folder(None, error=EngineError) as folder, Child(_WORKER) as child:
            timer = _Timer(child, folder, timing, threads, n_bytes, width)
            for found in timer.profiles(missing, known):
                is_kept = _keep(found, path)
                shown.advance(1)
    finally:
        shown.finish()
    assert found is not None
    if not is_kept:
        announce(f"{path} cannot be written: the speeds will be measured again")
    return found


def _keep(profile: SpeedProfile, path: Path) -> bool:
    """Return whether the profile could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.save(path)
    except (OSError, PlanError):
        return False
    return True


def beyond_cache(root: Path = _CACHES) -> int:
    """Return how many bytes are well beyond the largest cache of the CPU, as Linux tells it."""
    largest = 0
    for size in root.glob("index*/size"):
        text = size.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        largest = max(largest, int(digits) * unit if digits.isdigit() else 0)
    return min(max(_BEYOND_CACHE * largest, _LEAST_BYTES), _MOST_BYTES)


def _engine() -> str:
    try:
        return f"llama-cpp-python {version('llama-cpp-python')}"
    except PackageNotFoundError:
        return "llama-cpp-python of unknown version"


def _path(settings: str) -> Path:
    key = f"{cpu_name()}|{_engine()}|{settings}"
    return user_cache("speeds") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _kept(path: Path) -> SpeedProfile | None:
    """Return what was measured before; what cannot be read is measured again."""
    try:
        return SpeedProfile.from_json(path.read_text())
    except (OSError, ValueError, PlanError):
        return None


@dataclass(frozen=True)
class _Seconds:
    """Seconds of a generated token and of a token of a prompt."""

    generation: float
    prompt: float


class _Timer:
    """Times models of single formats, each beside the reference."""

    def __init__(
        self,
        child: Child,
        folder: Path,
        timing: TimeTogether,
        threads: int,
        n_bytes: int,
        width: int,
    ) -> None:
        self._child, self._folder, self._timing = child, folder, timing
        self._threads, self._n_bytes, self._width = threads, n_bytes, width

    def profiles(
        self, missing: Sequence[str], known: SpeedProfile | None
    ) -> Iterator[SpeedProfile]:
        """Yield the known profile with the first of the missing formats, with the first two, …."""
        system = self._load(SpeedModel.of_bytes(self._n_bytes, self._width, REFERENCE), REFERENCE)
        empty, references = self._timed(SpeedModel(_EMPTY_WIDTH, _EMPTY_LAYERS), "F16"), []
        ratios: dict[str, tuple[SpeedModel, _Seconds]] = {}
        refused = dict(known.refused) if known else {}
        for name in missing:
            model = SpeedModel.of_bytes(self._n_bytes, self._width, name)
            try:
                usual, found = self._timed(model, name)
            except ChildDiedError:
                raise
            except (EngineError, FormatError) as e:
                refused[name] = str(e).splitlines()[0]
            else:
                references.append(usual)
                ratio = found.generation / usual.generation, found.prompt / usual.prompt
                ratios[name] = (model, _Seconds(*ratio))
            yield self._profile(known, system, empty, references, ratios, refused)

    def _profile(
        self,
        known: SpeedProfile | None,
        system: SystemInfo,
        empty: tuple[_Seconds, _Seconds],
        references: Sequence[_Seconds],
        ratios: Mapping[str, tuple[SpeedModel, _Seconds]],
        refused: Mapping[str, str],
    ) -> SpeedProfile:
        """Return the known profile with these ratios to the reference as well."""
        if known is not None:
            layer = _Seconds(known.layer_seconds, known.layer_prompt_seconds)
            usual = _Seconds(known.reference_seconds, known.reference_prompt_seconds)
        else:
            layer = _Seconds(empty[1].generation / _EMPTY_LAYERS, empty[1].prompt / _EMPTY_LAYERS)
            usual = _Seconds(
                statistics.median(r.generation for r in references or [empty[0]]),
                statistics.median(r.prompt for r in references or [empty[0]]),
            )
        rates = dict(known.rates) if known else {}
        for name, (model, ratio) in ratios.items():
            rates[name] = FormatRate(
                generation=_rate(usual.generation * ratio.generation, layer.generation, model),
                prompt=_rate(usual.prompt * ratio.prompt, layer.prompt, model),
            )
        return SpeedProfile(
            ramgguf_version=__version__,
            cpu=cpu_name(),
            n_threads=self._threads,
            engine=_engine(),
            system=system,
            n_prompt=self._timing.n_prompt,
            n_rounds=self._timing.n_rounds,
            n_bytes=self._n_bytes,
            reference_seconds=usual.generation,
            reference_prompt_seconds=usual.prompt,
            layer_seconds=layer.generation,
            layer_prompt_seconds=layer.prompt,
            rates=rates,
            refused=dict(refused),
        )

    def _load(self, model: SpeedModel, name: str) -> SystemInfo:
        """Load a model in the format; its file is gone then."""
        path = self._folder / f"{name}.gguf"
        model.write(path, name)
        n_ctx = self._timing.n_prompt + self._timing.n_generated
        try:
            request = Load(path=str(path), n_ctx=n_ctx, n_threads=self._threads)
            return self._child.ask(request, Loaded).system
        finally:
            path.unlink()

    def _timed(self, model: SpeedModel, name: str) -> tuple[_Seconds, _Seconds]:
        """Return the seconds of the reference and of a model, timed in turn."""
        self._load(model, name)
        found = self._child.ask(self._timing, Together)
        self._child.ask(Drop(), Dropped)

        # The least of each: what else runs here only ever adds to it.
        reference, other = (
            _Seconds(min(generation), min(prompt) / self._timing.n_prompt)
            for generation, prompt in zip(found.generation, found.prompt, strict=True)
        )
        return reference, other


def _rate(seconds: float, layer_seconds: float, model: SpeedModel) -> float:
    """Return the seconds of a weight; what layers take besides is left out."""
    return max(seconds - model.n_layers * layer_seconds, seconds / 10) / model.n_weights
