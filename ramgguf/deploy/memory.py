"""From memory to a budget: the plan whose file, cache and graph fit where the model shall run."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from ramgguf.core.errors import BudgetError, PlanError
from ramgguf.core.units import format_bytes
from ramgguf.deploy.beside import BesideEstimator
from ramgguf.deploy.division_rooms import DivisionRooms, MemoryRequest, smaller_rooms
from ramgguf.deploy.footprint import Footprint, FootprintEstimator
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.offload import Placed, place
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.identity import difference
from ramgguf.gguf.layout import planned_header_bytes
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.measure.result import Measurement
from ramgguf.plan import ByteLimit, DivisionRoom, PlanAt, SourceSize
from ramgguf.plan.result import Division, MemoryBudget, Plan

_MOST_ROUNDS = 24
_ROUNDS_BOTH_WAYS = 2  # of two memories: what a division leaves may grow, too; then only shrink
CONTEXT_STEP = 256  # what llama.cpp rounds contexts up to


class MemoryPlanner:
    """Finds plans of one model that fit a request. Use as a context manager."""

    def __init__(self, file: GGUFFile, request: MemoryRequest) -> None:
        if request.ram is None and request.vram is None:
            raise BudgetError("name the memory that may be used: --memory, --fit or --vram")
        if request.beside.projector is not None and request.offloads:
            raise BudgetError(
                "a projector is planned with its model in RAM only: with a GPU, quantize it first, "
                "with --budget, and name the result with --mmproj"
            )
        self._file, self._request = file, request
        projector = request.beside.projector
        self._header_bytes = planned_header_bytes(file, {}, {})  # which take no memory
        self._header_bytes += projector.n_overhead_bytes if projector is not None else 0
        self._stack = contextlib.ExitStack()
        self._beside = self._stack.enter_context(BesideEstimator(request.beside, file))
        self._scale = self._stack.enter_context(FootprintEstimator(file))
        self._rooms = DivisionRooms(file, request)

    def __enter__(self) -> "MemoryPlanner":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _footprint(
        self, shape: ContextShape, tensor_types: Mapping[str, str], mmproj: Plan | None = None
    ) -> Footprint:
        """Return what the model takes, and what runs beside it."""
        return self._beside.added(self._scale.footprint(shape, tensor_types), mmproj)

    def budget(self) -> int:
        """Return the most bytes that a file can have, whatever its formats.

        A projector that is planned as well shares them. Raises BudgetError, which says what to
        change, when nothing is left for the weights.
        """
        footprint = self._footprint(self._request.shape, {})
        left = max(
            sum(
                max(0, limit) if limit is not None else use.weights
                for limit, use in ((room.ram, placed.ram), (room.vram, placed.vram))
            )
            for room in self._rooms.of(footprint, {})
            for placed in (place(footprint, room.division),)
        )
        if left <= 0:
            raise self._too_small(None)
        return self._header_bytes + left

    def fit(self, plan_for: PlanAt, most: int | None = None) -> Plan:
        """Return the best plan of plan_for, of at most `most` bytes, that fits the request.

        Raises BudgetError, which says what to change, when even the smallest plan does not.
        """
        budget = self.budget() if most is None else min(most, self.budget())
        made, placed, footprint = (
            self._divided(plan_for, budget)
            if self._request.offloads
            else self._in_ram(plan_for, budget)
        )
        record = self._record(footprint, placed, made.mmproj)
        update = {
            "memory": record,
            "notes": (*self._notes(), *self._beside.notes(made), *made.notes),
        }
        if self._request.beside.projector_plan is not None:
            update["mmproj"] = self._request.beside.projector_plan
        return made.model_copy(update=update)

    def _in_ram(self, plan_for: PlanAt, budget: int) -> tuple[Plan, Placed, Footprint]:
        """Return the plan of the largest budget that fits RAM, and what it takes."""
        projector = self._request.beside.projector
        for _ in range(_MOST_ROUNDS):
            try:
                made = (
                    plan_for(budget) if projector is None else plan_for(budget, projector=projector)
                )
            except BudgetError as e:
                if e.smallest is None:
                    raise
                types: Mapping[str, str] = {}
                if projector is None:
                    types = _types(plan_for(e.smallest))
                raise self._too_small(e.smallest, types) from None
            footprint = self._planned(made)
            placed = place(footprint, Division(n_gpu_layers=0))
            excess = self._excess(placed)
            if excess <= 0:
                return made, placed, footprint
            taken = made.n_bytes + (made.mmproj.n_bytes if made.mmproj else 0)
            budget = min(budget, taken) - excess
            if budget <= self._header_bytes:
                break
        raise self._too_small(None)

    def _divided(self, plan_for: PlanAt, budget: int) -> tuple[Plan, Placed, Footprint]:
        """Return the plan that fits RAM and the GPU together, and what it takes.

        What a division takes besides its weights depends a little on their formats: first it is
        guessed, then it follows from the plan before.
        """
        source = self._footprint(self._request.shape, {})
        share = min(1.0, budget / self._file.n_bytes)
        rooms = self._rooms.of(source.scaled(share), {}, share)
        fitting: tuple[Plan, Placed, Footprint] | None = None
        for number in range(_MOST_ROUNDS):
            try:
                made = plan_for(budget, self._rooms.pools(rooms))
            except BudgetError as e:
                if e.smallest is None:
                    raise
                if fitting is not None:
                    break
                if number == 0 and e.smallest < share * self._file.n_bytes:
                    share = e.smallest / self._file.n_bytes
                    rooms = self._rooms.of(source.scaled(share), {}, share)
                    continue
                raise self._no_division(plan_for, budget, rooms, e.smallest) from None
            assert made.division is not None
            footprint = self._planned(made)
            placed = place(footprint, made.division)
            if self._excess(placed) <= 0:
                made = made.model_copy(update={"budget": made.n_bytes})
                if fitting is None or made.total_cost <= fitting[0].total_cost:
                    fitting = made, placed, footprint
                if number:
                    break
            found = self._rooms.of(footprint, _types(made))
            rooms = found if number < _ROUNDS_BOTH_WAYS else smaller_rooms(rooms, found)
        if fitting is None:
            raise self._too_small(None)
        return fitting

    def _planned(self, made: Plan) -> Footprint:
        return self._footprint(self._request.shape, _types(made), made.mmproj)

    def _no_division(
        self, plan_for: PlanAt, budget: int, rooms: Sequence[DivisionRoom], smallest: int
    ) -> BudgetError:
        """Return the error of two memories too small, and whether other formats would fit."""
        error = self._too_small(smallest)
        if self._request.cpu_formats is None:
            return error
        try:
            plan_for(budget, self._rooms.pools(rooms, any_format=True))
        except BudgetError:
            return error
        names = ", ".join(self._request.cpu_formats)
        return BudgetError(
            f"{error}; --cpu-formats all fits: formats on the CPU's side are {names}", smallest
        )

    def _notes(self) -> list[str]:
        trained = self._file.metadata.integer(f"{self._file.architecture}.context_length")
        n_ctx = self._request.shape.n_ctx
        if trained is None or n_ctx <= trained:
            return []
        return [f"the model was trained for contexts of {trained} tokens, fewer than {n_ctx}"]

    def _excess(self, placed: Placed) -> int:
        """Return how much too large the larger excess of both memories is; not positive if none."""
        request = self._request
        return max(
            use.total - limit
            for limit, use in ((request.ram, placed.ram), (request.vram, placed.vram))
            if limit is not None
        )

    def _record(self, footprint: Footprint, placed: Placed, mmproj: Plan | None) -> MemoryBudget:
        request, shape = self._request, footprint.shape
        return MemoryBudget(
            limit=request.ram,
            limit_source=request.source,
            n_ctx=shape.n_ctx,
            n_seq=shape.n_seq,
            type_k=shape.type_k,
            type_v=shape.type_v,
            method=footprint.method,
            why_estimate=footprint.why_estimate,
            ram=placed.ram,
            n_gpu_layers=placed.division.n_gpu_layers if request.offloads else None,
            vram_limit=request.vram,
            vram=placed.vram if request.offloads else None,
            beside=self._beside.uses(shape, mmproj),
        )

    def _too_small(
        self, smallest: int | None, types: Mapping[str, str] = MappingProxyType({})
    ) -> BudgetError:
        """Return the error that names what takes the memory, and what would fit; types are those of
        the smallest plan, where they are known.
        """
        request, shape = self._request, self._request.shape
        use = self._footprint(shape, {}).use
        sequences = f" of each of {shape.n_seq} sequences" if shape.n_seq > 1 else ""
        has = " and ".join(
            f"{name} {format_bytes(n)}"
            for name, n in (("memory", request.ram), ("vram", request.vram))
            if n is not None
        )
        message = (
            f"the model with a context of {shape.n_ctx} tokens{sequences} does not fit {has}: "
            f"its cache takes {format_bytes(use.cache)}, compute buffers "
            f"{format_bytes(use.compute)}, overhead {format_bytes(use.overhead)}"
        )
        if request.offloads:
            footprint = self._footprint(shape, {})
            gpu = place(footprint, self._rooms.divisions(footprint)[0]).vram
            message += (
                f"; on the GPU, compute buffers {format_bytes(gpu.compute)}, overhead "
                f"{format_bytes(gpu.overhead)}"
            )
        for other in self._beside.uses(shape):
            if other.total:
                message += f" (of it {other.path}: {format_bytes(other.total)})"
        if smallest is not None:
            both = " of model and projector" if request.beside.projector is not None else ""
            message += f", and the smallest plan{both} is {format_bytes(smallest)}"
        return BudgetError(f"{message}. {self._advice(smallest, types)}", smallest)

    def _advice(self, known: int | None, types: Mapping[str, str]) -> str:
        """Return what to change: the context, the cache's type, the memory, or the floor.

        known is the smallest plan's bytes; until there is one, two bits per weight stand for it.
        """
        projector = self._request.beside.projector
        n_weights = self._file.n_weights + (projector.n_weights if projector else 0)
        smallest = known or self._header_bytes + n_weights // 4
        request, shape = self._request, self._request.shape
        total = (request.ram or 0) + (request.vram or 0)
        advice = []
        longest = self.longest_context(smallest, types=types)
        if 0 < longest < shape.n_ctx:
            about = "The" if known else "At about 2 bits per weight, the"
            advice.append(f"{about} largest context that fits is {longest}")
        if shape.type_k not in ("Q8_0", "Q4_0"):
            smaller = ContextShape(shape.n_ctx, shape.n_seq, "Q8_0", "Q8_0")
            one, other = (self._footprint(s, {}).use.cache for s in (shape, smaller))
            if other < one:
                advice.append(f"--cache-type q8_0 saves {format_bytes(one - other)}")
        footprint = self._footprint(shape, types)
        needed = smallest + footprint.use.total - footprint.use.weights + footprint.repacked
        if needed > total and not request.offloads:
            advice.append(f"or raise the memory to at least {format_bytes(needed * 1.002)}")
        advice.append("a lower --min-sqnr or more --formats allow smaller plans")
        return "; ".join(advice)

    def longest_context(
        self,
        n_bytes: int,
        besides: Callable[[int], int] = lambda _: 0,
        types: Mapping[str, str] = MappingProxyType({}),
    ) -> int:
        """Return the longest context with which a file of so many bytes fits; 0 if none does.

        The bytes are shared among the tensors as in these types, by default the source's. besides
        is what else a context of so many tokens takes.
        """
        shape = self._request.shape

        def fits(n_ctx: int) -> bool:
            tried = ContextShape(n_ctx, shape.n_seq, shape.type_k, shape.type_v)
            footprint = self._footprint(tried, types)
            # What kernels take again lies in no file.
            stored = footprint.use.weights - footprint.repacked
            share = (n_bytes - self._header_bytes) / stored
            overhead = footprint.overhead + besides(n_ctx)
            scaled = replace(footprint.scaled(share), overhead=overhead)
            return any(self._excess(place(scaled, s)) <= 0 for s in self._rooms.divisions(scaled))

        low, high = 0, shape.n_ctx // CONTEXT_STEP
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle * CONTEXT_STEP) else (low, middle - 1)
        return low * CONTEXT_STEP


def _types(plan: Plan) -> dict[str, str]:
    """Return the format of each tensor, by name."""
    return {a.name: a.format for a in plan.assignments}


@dataclass(frozen=True)
class MemoryRoom:
    """What memory leaves for the file of one model, and a budget if that is less."""

    n_bytes: int
    planner: MemoryPlanner

    def plan(self, plan_at: PlanAt) -> Plan:
        """Return the plan of this size, or the largest below it that fits the memory."""
        return self.planner.fit(plan_at, self.n_bytes)


@dataclass(frozen=True)
class MemoryLimit:
    """What fits the memory of a request, and the budget if one is given.

    The header of the model tells how much its cache takes; model is where it is, by default where
    it was measured.
    """

    request: MemoryRequest
    budget: int | str | None = None
    model: str | Path | None = None

    @property
    def projector(self) -> Measurement | None:
        """What was measured of the projector that is planned together with the model."""
        return self.request.beside.projector

    def settled(self, projector: Plan) -> "MemoryLimit":
        """Return the limit for which the projector has this plan."""
        beside = replace(self.request.beside, projector=None, projector_plan=projector)
        return replace(self, request=replace(self.request, beside=beside))

    @contextmanager
    def room(self, source: SourceSize) -> Iterator[MemoryRoom]:
        """Yield what the memory leaves.

        Raises BudgetError with the longest context that fits when nothing is left, PlanError when
        the model is another, or not there.
        """
        if self.budget is not None and self.projector is not None:
            raise BudgetError(
                "--budget limits the model's file, and the memory is shared with the projector's: "
                "leave it out, or quantize the projector first and name the result with --mmproj"
            )
        with (
            _measured_model(source, self.model) as file,
            MemoryPlanner(file, self.request) as planner,
        ):
            left = planner.budget()
            if self.budget is not None:
                left = min(left, ByteLimit(self.budget).n_bytes(source))
            yield MemoryRoom(left, planner)


def _measured_model(source: SourceSize, model: str | Path | None) -> GGUFFile:
    """Return the open model that was measured; raises PlanError if it is another."""
    path = source.path if model is None else local_path(model)
    if not path.exists() and model is None:
        raise PlanError(
            f"{path}: the model that was measured is not there, and only its header tells how much "
            "memory a context takes; name it with --model"
        )
    file = open_gguf(path)
    differs = difference(file, source)
    if differs is not None:
        file.close()
        raise PlanError(f"{path}: is not the model that was measured ({source.path}): {differs}")
    return file
