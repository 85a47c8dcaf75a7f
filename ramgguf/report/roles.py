"""Tensors by role: the formats they have, and what they take together."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class HasRole(Protocol):
    """A tensor of a plan, or of a file."""

    @property
    def role(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def n_bytes(self) -> int: ...
    @property
    def n_weights(self) -> int: ...


T = TypeVar("T", bound=HasRole)


@dataclass(frozen=True)
class RoleTensors(Generic[T]):
    """The tensors of one role."""

    role: str
    tensors: tuple[T, ...]

    @property
    def n_bytes(self) -> int:
        """Their bytes together."""
        return sum(t.n_bytes for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Their bits per weight."""
        return 8 * self.n_bytes / sum(t.n_weights for t in self.tensors)

    def formats(self, separator: str = "  ") -> str:
        """Return how many have which format, the most frequent first."""
        counts = Counter(t.format for t in self.tensors)
        return separator.join(f"{name} ×{n}" for name, n in counts.most_common())


def by_role(tensors: Iterable[T]) -> list[RoleTensors[T]]:
    """Return the tensors of each role, in the order in which the roles appear."""
    roles: dict[str, list[T]] = {}
    for tensor in tensors:
        roles.setdefault(tensor.role, []).append(tensor)
    return [RoleTensors(role, tuple(members)) for role, members in roles.items()]


def largest_first(tensors: Iterable[T]) -> list[RoleTensors[T]]:
    """Return the tensors of each role, the role with most bytes first."""
    return sorted(by_role(tensors), key=lambda r: -r.n_bytes)
