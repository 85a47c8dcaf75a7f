"""Options that several commands share, so that each is spelled and explained once."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ramgguf.core import files
from ramgguf.core.errors import PlanError
from ramgguf.core.progress import Progress, Silent
from ramgguf.gguf.hub import local_path, parse_address
from ramgguf.gguf.reader import open_gguf
from ramgguf.plan import DEFAULT_MIN_SQNR_DB, OBJECTIVE_NAMES, TARGETS, PlanOptions
from ramgguf.quantize import EFFORTS, Effort, default_effort
from ramgguf.quants.encoders import DEFAULT_ENCODER, ENCODERS, Encoder
from ramgguf.quants.formats import expand
from ramgguf.quants.stand_in import STAND_INS, StandIn
from ramgguf.report.progress import Bars
from ramgguf.report.terminal import PlainConsole
from ramgguf.sensitivity import Sensitivity

Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="GGUF model in F32, F16 or BF16 (any shard), a checkpoint's folder, hf://ORG/REPO or "
        "hf://ORG/REPO/FILE.gguf.",
    ),
]
AnyModel = Annotated[
    Path, typer.Argument(metavar="FILE", help="Any GGUF model, also hf://ORG/REPO/FILE.gguf.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where to write.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")]
Formats = Annotated[
    str | None,
    typer.Option(
        "--formats", help="Formats to choose from: Q3_K,Q6_K or the sets cpu-fast, k, linear."
    ),
]
_ENCODERS = "; ".join(f"{e.name}, {e.summary}" for e in ENCODERS.values())
EncoderOption = Annotated[
    str, typer.Option("--encoder", help=f"How blocks are fitted: {_ENCODERS}.")
]
OptionalEncoder = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        help=f"How blocks are fitted: {_ENCODERS}. Default: {DEFAULT_ENCODER}, or what the effort "
        "finds.",
    ),
]
Lora = Annotated[
    Path | None,
    typer.Option(
        "--lora",
        help="LoRA adapter, merged into MODEL: a GGUF file, or the folder of peft (for a "
        "checkpoint).",
    ),
]
ImatrixFile = Annotated[
    Path | None,
    typer.Option("--imatrix", help="Importance matrix of llama-imatrix, GGUF or .dat."),
]
Calibrate = Annotated[
    str | None,
    typer.Option(
        "--calibrate",
        help="Weigh errors by the activations on tokens of these sources: self (drawn from "
        "the model), mix (texts of the package), random, wikitext, FILE, or self,mix,FILE:2.",
    ),
]
StandInOption = Annotated[
    str,
    typer.Option(
        "--stand-in",
        help="What runs the passes: none (the model), q8_0, q6_k, q4_k (a quick quantization of "
        "it), auto (the model if it fits the memory, else the largest of these that fits; for "
        "sensitivities always the model).",
    ),
]
Scratch = Annotated[
    Path | None,
    typer.Option("--scratch", help="Folder for a copy of the model, or a stand-in, meanwhile."),
]
HessianFile = Annotated[
    Path | None,
    typer.Option("--hessian", help="Hessians of calibrate --hessian: weigh errors of outputs."),
]
ScalesFile = Annotated[
    Path | None,
    typer.Option("--scales", help="Column scales of transform: what matters gets more precision."),
]
EffortOption = Annotated[
    str | None,
    typer.Option(
        "--effort",
        help="fast: priors; auto: also a matrix and error feedback, as about 5 minutes allow; "
        "best: all that pays. Every step is gated on held-out text. Default: auto.",
    ),
]
Time = Annotated[
    str | None,
    typer.Option("--time", help="What auto or best may take: 90s, 20m, 1h; alone, of best."),
]
Objective = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help=f"What is minimised: {', '.join(OBJECTIVE_NAMES)}; default: weighted, with "
        "sensitivities posterior.",
    ),
]
SensitivityFile = Annotated[
    Path | None,
    typer.Option("--sensitivity", help="From the command sensitivity: plan by measured α."),
]
MinSqnr = Annotated[
    float, typer.Option("--min-sqnr", help="Floor for every tensor's SQNR, in dB; 0 for none.")
]
Pins = Annotated[
    list[str] | None,
    typer.Option("--pin", help="'regex=FORMAT' for the tensors whose name it matches; repeatable."),
]
Ties = Annotated[
    list[str] | None,
    typer.Option(
        "--tie", help="One format per layer for these roles: qkv, gate-up or role,role; repeatable."
    ),
]
MinSpeed = Annotated[
    float | None,
    typer.Option(
        "--min-speed",
        help="Tokens/s of generation, at least, here: formats are chosen by their speed on this "
        "machine, which is measured once.",
    ),
]
MinPromptSpeed = Annotated[
    float | None,
    typer.Option("--min-prompt-speed", help="The same of prompts of 512 tokens."),
]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="What runs the file: "
        + "; ".join(f"{t.name}, {t.summary}" for t in TARGETS.values())
        + ".",
    ),
]
MinFormats = Annotated[
    list[str] | None,
    typer.Option("--min-format", help="'role=FORMAT': no fewer bits for the role; repeatable."),
]
Requantize = Annotated[
    bool, typer.Option("--allow-requantize", help="Take quantized tensors as a source, too.")
]
TokenSources = Annotated[
    str,
    typer.Option(
        "--tokens",
        help="self (drawn from the model), mix (texts of the package), random, wikitext, a file, "
        "or several with weights: self,mix,FILE:2.",
    ),
]
TokenSeed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the tokens.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="Threads; default: one per CPU.")
]
Workers = Annotated[
    str | None,
    typer.Option(
        "--executor",
        metavar="WORKERS",
        help="Who runs the passes: dask://HOST:PORT or dask+tls://HOST:PORT (a cluster), local:N; "
        "--threads for each.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print every tensor.")]
OptionalBudget = Annotated[
    str | None,
    typer.Option("--budget", "-b", help="Bytes of the output file: 16GB, 16GiB, 4.5bpw, 30%."),
]
ExportTypes = Annotated[
    Path | None,
    typer.Option(
        "--export-tensor-types",
        help="Write the plan for llama-quantize --tensor-type-file, base type Q8_0.",
    ),
]


@dataclass(frozen=True)
class Terminal:
    """Where a command prints: results to stdout, progress and remarks to stderr."""

    out: Console
    err: Console
    progress: Progress
    announces: bool

    @classmethod
    def make(cls, *, quiet: bool, as_json: bool) -> "Terminal":
        """Return a terminal that shows results and remarks unless quiet or JSON, progress unless
        quiet: where stderr is a log, as a line a minute.
        """
        out, err = PlainConsole(quiet=quiet or as_json), PlainConsole(stderr=True)
        return cls(out, err, Silent() if quiet else Bars(err), not (quiet or as_json))

    def fetched(self, model: Path, lora: Path | None = None) -> Path:
        """Return the path of a model's GGUF file, fetched or converted first if need be."""
        quiet = not (self.announces and sys.stderr.isatty())
        return local_path(model, lora=lora, quiet=quiet, announce=self.announce)

    def announce(self, text: str) -> None:
        """Say what is going to be done, and for how long, unless nothing but results is wanted."""
        if self.announces:
            self.err.print(text, soft_wrap=True)


@dataclass(frozen=True)
class PlanChoice:
    """What is minimised, and what a plan must respect."""

    formats: Formats = None
    objective: Objective = None
    min_sqnr: MinSqnr = DEFAULT_MIN_SQNR_DB
    pin: Pins = None
    tie: Ties = None
    min_format: MinFormats = None
    target: For = None

    def binds_formats(self) -> bool:
        """Return whether the target wants some tensors in one format."""
        return self.target is not None and bool(TARGETS[self.target].ties)

    def require_target(self, *, writes_model: bool) -> None:
        """Raise a usage error for an unknown target, or one without effect on what is written."""
        if self.target is None:
            return
        if self.target not in TARGETS:
            raise typer.BadParameter(
                f"{self.target!r} is none of {', '.join(TARGETS)}", param_hint="--for"
            )
        if not (writes_model or self.binds_formats()):
            refuse_idle(["--for"], f"a plan for {self.target} is as any other; quantize serves it")

    def options(self, sensitivity: Sensitivity | Path | None = None) -> PlanOptions:
        """Return these as options of `plan`."""
        return PlanOptions(
            objective=self.objective,
            sensitivity=sensitivity,
            min_sqnr_db=self.min_sqnr,
            formats=split_formats(self.formats),
            pins=self.pin or (),
            ties=self.tie or (),
            min_formats=self.min_format or (),
            target=self.target,
        )

    def given(self) -> list[str]:
        """Return the options that were given, as they are spelled."""
        default = PlanChoice()
        changed = (
            f.name for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)
        )
        spelled = {"target": "for"}
        return [f"--{spelled.get(name, name).replace('_', '-')}" for name in changed]


def refuse_idle(given: Iterable[str], why: str) -> None:
    """Raise a usage error that says why the options given would have no effect; none, no error."""
    if names := ", ".join(given):
        raise typer.BadParameter(f"{why}: {names} would have no effect", param_hint=names)


def split_formats(text: str | None) -> list[str] | None:
    """Return the formats in a comma-separated list of them and of sets, or None for no list."""
    if text is None:
        return None
    names = list(expand(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise typer.BadParameter("name formats, or leave it out", param_hint="--formats")
    return names


def encoder(name: str | None) -> Encoder:
    """Return the encoder of this name, the default for None; anything else is a usage error."""
    name = name or DEFAULT_ENCODER
    if name not in ENCODERS:
        raise typer.BadParameter(
            f"{name!r} is none of {', '.join(ENCODERS)}", param_hint="--encoder"
        )
    return ENCODERS[name]


def stand_in(name: str) -> StandIn:
    """Return the stand-in of this name; anything else is a usage error."""
    for known in STAND_INS:
        if name == known:
            return known
    raise typer.BadParameter(f"{name!r} is none of {', '.join(STAND_INS)}", param_hint="--stand-in")


def effort(name: str | None, time: str | float | None, steps: Mapping[str, object]) -> Effort:
    """Return the effort of this name, or what the other options make of None.

    steps are those that the user may ask for one by one, by option; not None is asked for. An
    unknown name, and what would have no effect, are usage errors.
    """
    if name is not None and name not in EFFORTS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(EFFORTS)}", param_hint="--effort")
    given = [option for option, value in steps.items() if value is not None]
    level = name or default_effort(is_explicit=bool(given), has_time=time is not None)
    if level != "fast":
        refuse_idle(given, f"--effort {level} decides by itself what it does")
    elif time is not None:
        refuse_idle(["--time"], "the steps of --effort fast take what they take")
    return level


def require_model(model: Path) -> None:
    """Raise the error of a model that is not there; outputs beside it are not to blame."""
    if parse_address(model) is None and not model.exists():
        open_gguf(model).close()


def refuse_existing(*paths: Path | None, force: bool) -> None:
    """Raise PlanError when one of the paths, None aside, exists and may not be overwritten, or two
    are one file.
    """
    files.require_distinct(*paths, error=PlanError)
    for path in paths:
        if path is not None:
            files.refuse_existing(path, force=force, error=PlanError)
