"""How a plan was changed by trials, as values: what was swapped, and what it did to the KLD."""

from ramgguf.documents import NonNegative, NonNegativeFloat, Positive, _Value


class FormatChange(_Value):
    """A tensor that a refinement gave another format."""

    name: str
    before: str
    after: str


class KLDChange(_Value):
    """Mean KLD in nats per token over some tokens, before and after a refinement.

    error is the standard error of the difference; sha256 is over the tokens' ids.
    """

    n_tokens: Positive
    sha256: str
    before: NonNegativeFloat
    after: NonNegativeFloat
    error: NonNegativeFloat


class Refinement(_Value):
    """How a plan was changed by trials: real KLD, weights decoded to the source's own type.

    Swaps were proposed by what `proposal` told, and each was taken because it lowered the KLD over
    `acceptance`; `report` are tokens that decided nothing. cpus names the CPUs that computed.
    """

    tokens: str
    seed: NonNegative
    n_tried: NonNegative
    swaps: tuple[tuple[FormatChange, ...], ...]
    proposal: KLDChange
    acceptance: KLDChange
    report: KLDChange
    cpus: tuple[str, ...] = ()
