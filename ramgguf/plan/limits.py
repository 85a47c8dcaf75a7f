"""What bounds the size of an output: bytes, or whatever else leaves a number of bytes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Protocol, runtime_checkable

from ramgguf.core.errors import BudgetError
from ramgguf.core.units import parse_budget
from ramgguf.gguf.identity import Source
from ramgguf.gguf.reader import GGUFFile
from ramgguf.measure.result import Measurement
from ramgguf.plan.pools import Pools
from ramgguf.plan.result import Plan


class PlanAt(Protocol):
    """Plans for a number of bytes of file, and for two memories where there are any.

    With a projector, the bytes are those of its file and the model's, and both are planned.
    """

    def __call__(
        self, budget: int, pools: Pools | None = None, projector: Measurement | None = None
    ) -> Plan: ...


@dataclass(frozen=True)
class SourceSize:
    """The model that is quantized, as far as limits ask: its file, weights and bytes."""

    path: Path
    n_weights: int
    n_bytes: int
    header_sha256: str
    sample_sha256: str | None = None

    @classmethod
    def of(cls, file: GGUFFile) -> "SourceSize":
        """Return that of an open model."""
        return cls(
            file.paths[0],
            file.n_weights,
            file.n_bytes,
            file.header_sha256,
            file.sample_sha256,
        )

    @classmethod
    def measured(cls, source: Source, n_weights: int) -> "SourceSize":
        """Return that of the model that a value was made from."""
        return cls(
            Path(source.path),
            n_weights,
            source.n_bytes,
            source.header_sha256,
            source.sample_sha256,
        )


class Room(Protocol):
    """The bytes that a limit leaves for the output of one model."""

    @property
    def n_bytes(self) -> int:
        """The most bytes that the whole output file may have, whatever its formats."""

    def plan(self, plan_at: PlanAt) -> Plan:
        """Return the best plan that keeps to the limit; plan_at plans for a number of bytes.

        Raises BudgetError, which says what to change, when no plan does.
        """


class SizeLimit(Protocol):
    """What an output must keep to. Bytes are one kind; memory (ramgguf.deploy) is another."""

    def room(self, source: SourceSize) -> AbstractContextManager[Room]:
        """Return the room for the output of a model; raises BudgetError when there is none."""


@runtime_checkable
class JointLimit(SizeLimit, Protocol):
    """A limit that may plan a projector together with the model."""

    @property
    def projector(self) -> Measurement | None:
        """What was measured of the projector that is planned as well, None if there is none."""

    def settled(self, projector: Plan) -> SizeLimit:
        """Return the limit for which the projector has this plan, in every plan of the model."""


@dataclass(frozen=True)
class ByteRoom:
    """A number of bytes."""

    n_bytes: int

    def plan(self, plan_at: PlanAt) -> Plan:
        """Return the plan for all of them."""
        return plan_at(self.n_bytes)


@dataclass(frozen=True)
class ByteLimit:
    """At most so many bytes: a number, or text such as 16GB, 16GiB, 4.5bpw or 30%."""

    budget: int | str

    def n_bytes(self, source: SourceSize) -> int:
        """Return the bytes that it stands for; raises BudgetError when it is no budget."""
        if isinstance(self.budget, str):
            return parse_budget(
                self.budget, n_weights=source.n_weights, n_bytes_source=source.n_bytes
            )
        if self.budget <= 0:
            raise BudgetError(f"budget is {self.budget} bytes; it must be positive")
        return self.budget

    @contextmanager
    def room(self, source: SourceSize) -> Iterator[ByteRoom]:
        """Yield the room, which needs no closing."""
        yield ByteRoom(self.n_bytes(source))


def size_limit(limit: int | str | SizeLimit) -> SizeLimit:
    """Return the limit; a number or text is one of bytes.

    Raises BudgetError for anything else.
    """
    if isinstance(limit, Integral):
        limit = int(limit)
    if isinstance(limit, int | str):
        return ByteLimit(limit)
    if not hasattr(limit, "room"):
        raise BudgetError(
            f"budget {limit!r} is no number of bytes, no text such as 16GB or 4.5bpw, and no limit"
        )
    return limit
