"""What runs beside the model in the same memory: a vision projector, and a draft model.

Both stay in RAM. A projector takes its file's tensors; what llama.cpp's image code computes with is
not known here. A draft model takes weights, a cache of the same context and compute buffers.
"""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from ramgguf.core.errors import BudgetError
from ramgguf.deploy.draft_model import draft_notes, require_draft
from ramgguf.deploy.footprint import Footprint, FootprintEstimator
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.identity import require_model
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import BesideUse, Plan
from ramgguf.quantize import default_output


@dataclass(frozen=True)
class BesideModel:
    """The files of a vision projector and of a draft model, if there are any.

    With a measurement of the projector, its formats are planned together with the model's; with a
    plan of it, they are those.
    """

    mmproj: Path | None = None
    draft: Path | None = None
    projector: Measurement | None = None
    projector_plan: Plan | None = None


class BesideEstimator:
    """Adds to a model's footprint what runs beside it. Use as a context manager.

    Raises BudgetError for a projector that is none, or a draft model that llama.cpp refuses,
    PlanError for a measurement or plan of another projector.
    """

    def __init__(self, beside: BesideModel, model: GGUFFile) -> None:
        self._beside, self._stack = beside, contextlib.ExitStack()
        with self._stack:
            self._projector = self._opened(beside.mmproj)
            self._draft = self._opened(beside.draft)
            if self._projector is not None:
                _require_projector(self._projector)
                for what, made in (
                    ("measurement", beside.projector),
                    ("plan", beside.projector_plan),
                ):
                    if made is not None:
                        require_model(f"the projector's {what}", made.source, self._projector)
            self._scale: FootprintEstimator | None = None
            if self._draft is not None:
                require_draft(self._draft, model)
                self._scale = self._stack.enter_context(FootprintEstimator(self._draft))
            self._stack = self._stack.pop_all()

    def _opened(self, path: Path | None) -> GGUFFile | None:
        return None if path is None else self._stack.enter_context(open_gguf(local_path(path)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def uses(self, shape: ContextShape, mmproj: Plan | None = None) -> tuple[BesideUse, ...]:
        """Return what each file takes with such a context of the model.

        A projector that is planned with the model takes what its plan says, before that nothing.
        """
        found = []
        if self._projector is not None:
            weights = sum(t.n_bytes for t in self._projector.tensors)
            path, planned = self._projector.paths[0], mmproj or self._beside.projector_plan
            if planned is not None:
                weights = sum(a.n_bytes for a in planned.assignments)
                path = default_output(path, planned)
            elif self._beside.projector is not None:
                weights = 0
            found.append(BesideUse(kind="mmproj", path=str(path), weights=weights))
        if self._scale is not None and self._draft is not None:
            use = self._scale.footprint(replace(shape, type_k="F16", type_v="F16"), {}).use
            found.append(
                BesideUse(
                    kind="draft",
                    path=str(self._draft.paths[0]),
                    weights=use.weights,
                    cache=use.cache,
                    compute=use.compute,
                )
            )
        return tuple(found)

    def notes(self, plan: Plan) -> tuple[str, ...]:
        """Return what is to be said of what runs beside a model with this plan."""
        return () if self._draft is None else tuple(draft_notes(self._draft, plan))

    def added(self, footprint: Footprint, mmproj: Plan | None = None) -> Footprint:
        """Return the model's footprint with these files' as part of its overhead."""
        more = sum(use.total for use in self.uses(footprint.shape, mmproj))
        return replace(footprint, overhead=footprint.overhead + more)


def _require_projector(file: GGUFFile) -> None:
    if not file.is_projector:
        raise BudgetError(
            f"{file.paths[0]}: is a {file.architecture} model, expected a vision projector (clip); "
            "name the mmproj file with --mmproj"
        )
