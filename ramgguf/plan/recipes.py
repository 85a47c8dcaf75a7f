"""What anybody's plan or GGUF file gives to each tensor: to be compared, or applied elsewhere."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from ramgguf.core.documents import Document, FrozenModel, Positive
from ramgguf.core.errors import PlanError
from ramgguf.gguf.architecture import role_of
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan


class RecipeTensor(FrozenModel):
    """A tensor and its format; shape is in ggml's order, None when only a plan was read."""

    name: str
    role: str
    format: str
    n_weights: Positive
    n_bytes: Positive
    shape: tuple[Positive, ...] | None = None


class Recipe(Document):
    """The formats of a model's tensors, from any tool."""

    KIND: ClassVar[str] = "recipe"

    path: str
    n_bytes: Positive
    tensors: Annotated[tuple[RecipeTensor, ...], Field(min_length=1)]

    @property
    def n_weights(self) -> int:
        return sum(t.n_weights for t in self.tensors)

    @property
    def bpw(self) -> float:
        return 8 * sum(t.n_bytes for t in self.tensors) / self.n_weights

    @classmethod
    def of_file(cls, file: GGUFFile) -> "Recipe":
        """Return what an open GGUF file gives to its tensors."""
        architecture = file.metadata.string("general.architecture") or ""
        return cls(
            path=str(file.paths[0]),
            n_bytes=file.n_bytes,
            tensors=tuple(
                RecipeTensor(
                    name=t.name,
                    role=role_of(t.name, architecture),
                    format=t.type_name,
                    n_weights=t.n_weights,
                    n_bytes=t.n_bytes,
                    shape=t.shape,
                )
                for t in file.tensors
            ),
        )

    @classmethod
    def of_plan(cls, plan: Plan, path: str) -> "Recipe":
        """Return what a plan gives to its tensors."""
        return cls(
            path=path,
            n_bytes=plan.n_bytes,
            tensors=tuple(
                RecipeTensor(
                    name=a.name,
                    role="embedding" if a.role == "tied_embedding" else a.role,
                    format=a.format,
                    n_weights=a.n_weights,
                    n_bytes=a.n_bytes,
                )
                for a in plan.assignments
            ),
        )

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Return the recipe of a GGUF file (or of one on the hub), a plan or a recipe's own file.

        Raises GGUFError, HubError or PlanError for whatever is wrong with it.
        """
        path = local_path(path)
        try:
            with path.open("rb") as f:
                head = f.read(512).lstrip()
        except OSError:  # missing, a folder, an address: opening it as a model says what to do
            head = b""
        if not head.startswith(b"{"):
            with open_gguf(path) as file:
                return cls.of_file(file)
        if b'"ramgguf.plan/' in head:
            return cls.of_plan(Plan.load(path), str(path))
        return cls.load(path)


def pins_for(recipe: Recipe, measurement: Measurement) -> tuple[str, ...]:
    """Return the pins that give every quantizable tensor of the measured model its recipe's format.

    Raises PlanError when a tensor is missing or of another shape.
    """
    known = {t.name: t for t in recipe.tensors}
    pins = []
    for tensor in measurement.tensors:
        if tensor.kept is not None:
            continue
        wanted = known.get(tensor.name)
        if wanted is None:
            raise PlanError(f"{recipe.path} has no tensor {tensor.name}; it is of another model")
        if wanted.n_weights != tensor.n_weights or wanted.shape not in (None, tensor.shape):
            raise PlanError(
                f"{tensor.name} is {wanted.shape or wanted.n_weights} in {recipe.path} and "
                f"{tensor.shape} here; a recipe needs the same shapes"
            )
        pins.append(f"^{re.escape(tensor.name)}$={wanted.format}")
    return tuple(pins)


@dataclass(frozen=True)
class Change:
    """A tensor that two recipes treat differently; None where one lacks it."""

    name: str
    role: str
    a: RecipeTensor | None
    b: RecipeTensor | None

    @property
    def n_bytes(self) -> int:
        """Bytes that B takes more than A."""
        return (self.b.n_bytes if self.b else 0) - (self.a.n_bytes if self.a else 0)


@dataclass(frozen=True)
class Difference:
    """Two recipes, tensor by tensor; changes are in A's order, then what only B has."""

    a: Recipe
    b: Recipe
    changes: tuple[Change, ...]
    n_same: int


def diff(a: Recipe, b: Recipe) -> Difference:
    """Return the tensors whose format, or number of weights, differ between the two."""
    in_a, in_b = {t.name: t for t in a.tensors}, {t.name: t for t in b.tensors}
    changes = []
    for name in [*in_a, *(n for n in in_b if n not in in_a)]:
        x, y = in_a.get(name), in_b.get(name)
        if x and y and (x.format, x.n_weights) == (y.format, y.n_weights):
            continue
        known = x or y
        changes.append(Change(name, known.role if known else "", x, y))
    n_same = len(in_a.keys() | in_b.keys()) - len(changes)
    return Difference(a, b, tuple(changes), n_same)
