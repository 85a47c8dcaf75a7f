"""Which steps of an effort fit the time, in the order of what they bring per second.

The matrix comes first: the others build on it, and it brings most per second. Where the time is
short, fewer tokens are calibrated on and the gates are shorter, before a step is left out.
"""

from dataclasses import dataclass, field
from itertools import product
from typing import Literal, get_args

from ramgguf.core.units import format_bytes, format_seconds
from ramgguf.quants.encoders import EncoderName

Effort = Literal["fast", "auto", "best"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)
StepName = Literal[
    "importance matrix",
    "massive activations",
    "sensitivities",
    "error feedback",
    "quantized inputs",
    "swaps",
]

N_CTX = 512  # tokens of a sequence that is calibrated on
GATE_CTX = 256  # of a gate's window
N_DOMAINS = 5
# How much is read for the matrix and at each gate, best first: sequences, windows per domain.
SIZES = (
    *((64, 6), (64, 4), (48, 6), (48, 4), (48, 3), (32, 6), (32, 4), (32, 3), (24, 4), (24, 3)),
    *((16, 4), (16, 3), (16, 2), (12, 3), (12, 2), (8, 3)),
    *((8, 2), (6, 2), (4, 2), (4, 1), (2, 1), (1, 1)),
)
FEEDBACK: tuple[EncoderName, ...] = ("descent", "gptq")  # best first
ENOUGH_FOR_FEEDBACK = 32  # sequences: for more, no other step is left out
MOST_FOR_AUTO = 48  # sequences: error feedback gains little from more (docs/findings.md)
LEAST_FOR_FEEDBACK = 16  # sequences: fewer tell too little of the inputs' correlations
LEAST_READ = 8  # sequences that may take more than READING_SHARE of the time
READING_SHARE = 0.5
SENSITIVITY_SECONDS = 1200.0
SENSITIVITY_SHARE = 0.4
N_TRIALS = 32
# Rounding layer by layer reads tokens with the model, and in each layer up to every input and to
# its end with what is rounded; of each input it adds up two products, of which a Hessian takes half
# of one.
LAYER_SEQUENCES, LAYER_READS, LAYER_GRAMS = 24, 4.0, 3.0
PROBE_READS = 8  # what a few dozen passes over a few tokens take, in sequences read
CHANGED_SHARE = 0.3  # of the weights: those whose format changes after a few pins, at most
DISK_SHARE = 0.5
# Trials round by search. What they gain there is less than what feedback changes (docs/quality.md).
SWAPS_LEFT_OUT = "swaps: left out, they are tried without error feedback"
MOST_ROUNDS = max(n_rounds for _, n_rounds in SIZES)


@dataclass(frozen=True)
class Costs:
    """What was measured on this model and machine, in seconds.

    write is a candidate by priors, from measuring to writing; read a sequence of N_CTX tokens
    under the tap; gram the same with XᵀX of all inputs; feedback GPTQ's sweep over all weights,
    descent the same followed by coordinate descent. hessian_bytes is what all Hessians take.
    window is a gate's window scored by a candidate: small formats can be slower than the source,
    and are then decoded for it, which takes decode (0: not decoded).
    keeps_reference: gates read what the source says from a file, after the first of them.
    save writes all Hessians, for a run that goes on after a kill and at the end. scale chooses
    scales and tries them, twice where experts are chosen (0: the model has none).
    """

    write: float
    read: float
    gram: float
    feedback: float
    descent: float
    hessian_bytes: int
    window: float
    keeps_reference: bool = False
    decode: float = 0.0
    save: float = 0.0
    scale: float = 0.0

    @property
    def source_round(self) -> float:
        """A window of each domain, read by the source."""
        return N_DOMAINS * GATE_CTX / N_CTX * self.read

    @property
    def round(self) -> float:
        """A window of each domain, scored by a candidate."""
        return N_DOMAINS * self.window

    @property
    def gate_round(self) -> float:
        """The same, and by the source where it is not kept what that says."""
        return self.round + (0.0 if self.keeps_reference else self.source_round)


@dataclass(frozen=True)
class Kept:
    """What earlier runs left: the sequences of the largest matrix, 0 for none, and what else.

    hessian and scales are those that belong to the matrix; free_bytes is the room for new ones.
    """

    matrix: int = 0
    hessian: bool = False
    massive: bool = False
    sensitivity: bool = False
    scales: bool = False
    free_bytes: int = 1 << 62


@dataclass(frozen=True)
class Step:
    """A step that is planned: what it does, and how long that is expected to take.

    measuring is the part of the seconds for what is measured before a candidate is written.
    """

    name: StepName
    what: str
    seconds: float
    measuring: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """The steps in their order; left_out says, a line each, what does not fit and why.

    n_sequences are read for the matrix (as many as a kept one has, if that will do), Hessians from
    the same passes if with_hessians; each gate reads n_rounds windows of every domain. encoder is
    that of error feedback.
    """

    steps: tuple[Step, ...] = ()
    n_sequences: int = 0
    n_rounds: int = 0
    with_hessians: bool = False
    encoder: EncoderName = "gptq"
    left_out: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """What all steps take."""
        return sum(step.seconds for step in self.steps)


def schedule(effort: Effort, limit: float, costs: Costs, kept: Kept, tokens: str) -> Schedule:
    """Return the steps that fit the limit in seconds; tokens names what is calibrated on."""
    measures = (True, False) if effort == "best" else (False,)
    tries = [
        _Try(effort, limit, costs, kept, tokens, *size, encoder, *chosen)
        for chosen in product(measures, (True, False), (True, False))
        for size, encoder in product(SIZES, FEEDBACK)
        if effort == "best" or size[0] <= MOST_FOR_AUTO
    ]
    for one in tries:
        one.fill()
    fitting = [
        one
        for one in tries
        if one.has("importance matrix") and one.with_feedback == one.has("error feedback")
    ]
    if not fitting:
        least = tries[-1]  # the smallest size
        needed = sum(step.seconds for step in least.steps) or least.matrix().seconds
        line = (
            f"importance matrix: left out, about {format_seconds(needed)} of "
            f"{format_seconds(max(0.0, limit))}; give more with --time"
        )
        return Schedule(left_out=(line,))
    # Error feedback brings more per second than formats for massive activations, and than
    # sensitivities; so do its tokens up to ENOUGH_FOR_FEEDBACK. Quantized inputs bring more than
    # sensitivities.
    fed = [t for t in fitting if t.has("error feedback") and t.n_read >= LEAST_FOR_FEEDBACK]
    fed.sort(key=lambda t: (-min(t.n_read, ENOUGH_FOR_FEEDBACK), not t.has_priority))
    whole = [t for t in fed if t.has("massive activations") and t.n_read >= ENOUGH_FOR_FEEDBACK]
    fitting = [t for t in fitting if t.with_massive]
    calm = [t for t in fitting if t.reading <= READING_SHARE * limit or t.n <= LEAST_READ]
    best = (whole or fed or calm or fitting)[0]
    return Schedule(
        tuple(best.steps),
        best.n_read,
        best.n_rounds,
        best.with_hessians,
        best.encoder,
        tuple(best.left_out),
    )


def rounds_within(step: Step, n_rounds: int, seconds: float, costs: Costs) -> int:
    """Return how many windows per domain the step's gate may have, n_rounds at most, so that the
    step takes no more than the seconds; 0 where it takes more with one.
    """
    fitting = (
        n
        for n in range(n_rounds, 0, -1)
        if step.seconds - (n_rounds - n) * costs.gate_round <= seconds
    )
    return next(fitting, 0)


@dataclass
class _Try:
    """The steps with so many sequences of calibration, and rounds of each gate."""

    effort: Effort
    limit: float
    costs: Costs
    kept: Kept
    tokens: str
    n: int
    n_rounds: int
    encoder: EncoderName
    with_sensitivities: bool
    with_massive: bool
    with_feedback: bool
    steps: list[Step] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def n_read(self) -> int:
        """Sequences of the matrix: a kept one serves from half of the wanted tokens on."""
        return self.kept.matrix if 2 * self.kept.matrix >= self.n else self.n

    @property
    def is_kept(self) -> bool:
        return self.n_read == self.kept.matrix

    @property
    def with_hessians(self) -> bool:
        """Whether the passes that make a matrix make the Hessians, too."""
        return self.with_feedback and not self.is_kept

    @property
    def reading(self) -> float:
        """Seconds of the passes that make a matrix."""
        grams = self.costs.gram if self.with_hessians else 0.0
        return 0.0 if self.is_kept else self.n * (self.costs.read + grams)

    @property
    def hessian_size(self) -> str:
        return format_bytes(self.costs.hessian_bytes)

    @property
    def first_gate(self) -> float:
        """The source, the file before and the candidate."""
        scoring = self.n_rounds * (self.costs.source_round + 2 * self.costs.round)
        return scoring + 2 * self.costs.decode

    @property
    def gate(self) -> float:
        """The candidate, and what gates compare it with."""
        return self.n_rounds * self.costs.gate_round + self.costs.decode

    @property
    def saving(self) -> float:
        """Seconds of writing the Hessians of a matrix's passes."""
        return self.costs.save if self.with_hessians else 0.0

    @property
    def sweeping(self) -> float:
        """Seconds of error feedback in all weights."""
        return self.costs.descent if self.encoder == "descent" else self.costs.feedback

    def has(self, name: StepName) -> bool:
        return any(step.name == name for step in self.steps)

    @property
    def has_priority(self) -> bool:
        """Whether it has the step for which best leaves sensitivities out."""
        return self.effort == "best" and self.has("quantized inputs")

    def fill(self) -> None:
        """Take the steps in turn, each if it fits what those before it leave."""
        if self.effort == "auto":  # what brings most per second first
            makers = [self.matrix, self.feedback, self.massive]
        else:
            makers = [self.matrix, self.massive, self.sensitivities, self.feedback, self.swaps]
        makers.append(self.quantized_inputs)
        yielding = [(self.with_massive, "massive activations", self.massive)]
        if self.effort == "best":
            yielding.append((self.with_sensitivities, "sensitivities", self.sensitivities))
        for is_taken, name, maker in yielding:
            if not is_taken:
                makers.remove(maker)
                self.left_out.append(
                    f"{name}: left out, error feedback and what follows it need the time"
                )
        for make in makers:
            if make == self.swaps and self.has("error feedback"):
                self.left_out.append(SWAPS_LEFT_OUT)
                continue
            if make == self.quantized_inputs and not self.has("error feedback"):
                continue
            step = make()
            if why := self._obstacle(step):
                self.left_out.append(f"{step.name}: left out, {why}")
                if step.name == "importance matrix":
                    return  # the others build on it
                continue
            self.steps.append(step)

    @property
    def left(self) -> float:
        """Seconds that the steps so far leave."""
        return self.limit - sum(step.seconds for step in self.steps)

    def _obstacle(self, step: Step) -> str | None:
        left = self.left
        needed = self.costs.hessian_bytes
        is_new = not (self.is_kept and self.kept.hessian)
        if step.name == "error feedback" and is_new and needed > DISK_SHARE * self.kept.free_bytes:
            return (
                f"its Hessians take {format_bytes(needed)} of disk, "
                f"{format_bytes(self.kept.free_bytes)} are free"
            )
        if step.name == "error feedback" and self.n_read < LEAST_FOR_FEEDBACK:
            return f"{self.n_read} × {N_CTX} tokens tell too little of how inputs go together"
        if step.seconds > left:
            spent = f"{format_seconds(step.seconds)} of {format_seconds(max(0.0, left))}"
            return f"about {spent} that are left"
        return None

    def matrix(self) -> Step:
        """Its gate is the first."""
        source = "kept" if self.is_kept else self.tokens
        also = f", with Hessians of {self.hessian_size}" if self.with_hessians else ""
        scales = ", and scales" if self.costs.scale else ""
        scaling = 0.0 if self.is_kept and self.kept.scales else self.costs.scale
        return Step(
            "importance matrix",
            f"{self.n_read} × {N_CTX} tokens ({source}){also}{scales}",
            self.reading + self.saving + scaling + self.costs.write + self.first_gate,
            self.reading,
        )

    def massive(self) -> Step:
        """A few tokens by a few dozen passes; the gate is longer by windows of 16 tokens.

        After error feedback, what changes its format is rounded by it, too.
        """
        probe = 0.0 if self.kept.massive else PROBE_READS * self.costs.read
        sweeping = CHANGED_SHARE * self.sweeping if self.has("error feedback") else 0.0
        return Step(
            "massive activations",
            "tensors that the first token of a text depends on",
            probe + sweeping + self.costs.write + self.gate + self.costs.read,
            probe,
        )

    def sensitivities(self) -> Step:
        seconds = min(SENSITIVITY_SECONDS, SENSITIVITY_SHARE * max(0.0, self.left))
        if self.kept.sensitivity:
            seconds = 0.0
        return Step(
            "sensitivities",
            "of every tensor, by forward passes",
            seconds + self.costs.write + self.gate,
            seconds,
        )

    def feedback(self) -> Step:
        """Errors are measured as the blocks are written."""
        is_there = self.with_hessians or (self.is_kept and self.kept.hessian)
        again = self.n_read * (self.costs.read + self.costs.gram) + self.costs.save
        reading = 0.0 if is_there else again
        sweep = "GPTQ and coordinate descent" if self.encoder == "descent" else "GPTQ"
        return Step(
            "error feedback",
            f"{sweep}, with Hessians of {self.hessian_size}",
            reading + self.sweeping + self.costs.write + self.gate,
            reading,
        )

    def quantized_inputs(self) -> Step:
        """The formats stay; a copy of the model is written, and loaded from each layer on."""
        costs, n = self.costs, min(self.n_read, LAYER_SEQUENCES)
        reading = n * (LAYER_READS * costs.read + LAYER_GRAMS * costs.gram)
        return Step(
            "quantized inputs",
            "weights for what the rounded layers before theirs put out",
            reading + self.sweeping + 2 * costs.write + self.gate,
            reading,
        )

    def swaps(self) -> Step:
        """Three sets of sequences: proposal and acceptance for each trial, a report at the end."""
        trials = (3 * N_TRIALS + 24) * self.costs.read
        return Step(
            "swaps",
            f"{N_TRIALS} tried by forward passes",
            trials + self.costs.write + self.gate,
            trials,
        )
