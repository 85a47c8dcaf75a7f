"""Sensitivity keeps to its time: a clock that costs advance, and passes that take what they say."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

import ramgguf
from ramgguf.core.progress import Silent
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama.forward import ForwardRequest, ForwardResult
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.tokens import TokenRequest
from ramgguf.sensitivity.alpha import measure_alpha
from ramgguf.sensitivity.result import Sensitivity
from ramgguf.sensitivity.starts import Depth, Starts, TensorPass
from ramgguf.sensitivity.timing import Costs, Timer, spread_order
from tiny_models import write_tiny_model

N_CTX = 64
TOLERANCE = 1.25  # the command ends within this much of the time that was asked for, or announced


@dataclass
class Passes:
    """A runner that computes nothing: each step moves the clock by what it costs.

    loading comes with the first step; drawing is for a token, each for a pass, encoding for a
    weight. From the reading `slow_from` on, everything takes `slower` times as long. With
    reload_seconds, passes begin at the layer that is asked for: getting there takes these, and the
    passes over what is left out and what is left. refuses: they begin at the first in any case.
    tells_errors: passes may end at a layer.
    """

    file: GGUFFile
    loading: float
    drawing: float
    each: float
    encoding: float
    slow_from: int = 10**9
    slower: float = 1.0
    reload_seconds: float | None = None
    refuses: bool = False
    tells_errors: bool = False
    start: int = 0
    starts: list[int] = field(default_factory=list)
    now: float = 0.0
    n_read: int = 0
    known: set[bytes] = field(default_factory=set)
    ends: set[tuple[int, bytes]] = field(default_factory=set)
    n_workers: int = 1
    n_vocab: int = 260
    build: str = "made up"
    cpus: tuple[str, ...] = ("none",)

    def _take(self, seconds: float) -> None:
        self.now += seconds * (self.slower if self.n_read >= self.slow_from else 1.0) + self.loading
        self.loading = 0.0

    def _original(self, sequences: Sequence[TokenIds]) -> None:
        for ids in sequences:
            if ids.tobytes() not in self.known:
                self.known.add(ids.tobytes())
                self._take(self.each)

    def draw(self, request: TokenRequest, indices: Sequence[int]) -> tuple[TokenIds, ...]:
        if request.tokens == "self":
            self._take(self.drawing * len(indices) * (request.n_ctx - 1))
        return tuple(np.full(request.n_ctx, i + request.n_ctx, np.int32) for i in indices)

    def draw_sets(
        self, request: TokenRequest, sizes: Sequence[int], first: int
    ) -> tuple[tuple[TokenIds, ...], ...]:
        raise NotImplementedError

    def seconds(self, ids: TokenIds) -> float:
        self._original([ids])
        self._take(self.each)
        return self.each

    def prepare(self, sequences: Sequence[TokenIds]) -> str:
        self._original(sequences)
        return "the same"

    def run(self, wanted: Sequence[ForwardRequest]) -> Iterator[tuple[int, ForwardResult]]:
        for position, one in enumerate(wanted):
            self._original(one.sequences)
            for name, _ in one.changes:
                self._take(self.encoding * self.file.tensor(name).n_weights)
                self.n_read += 1
            why_whole = self._begin(one)
            share = self.depth.shares[self.start]
            kld, errors = np.full(N_CTX * len(one.sequences), 0.01 if one.changes else 0.0), None
            if one.end is not None:
                share -= self.depth.after(one.end)
                errors = np.full(len(kld), 1e-3) if self.tells_errors else None
                if (one.end, one.sequences[0].tobytes()) not in self.ends:
                    self.ends.add((one.end, one.sequences[0].tobytes()))
                    self._take(self.each * share * len(one.sequences))
            self._take(self.each * share * len(one.sequences))
            yield position, ForwardResult(kld, (0.005,) * len(one.changes), why_whole, errors)

    @property
    def depth(self) -> Depth:
        return Depth.of(self.file)

    def _begin(self, one: ForwardRequest) -> str | None:
        """Get to the start of the pass; return why it is another."""
        for name, _ in one.changes:
            assert one.start <= self.depth.first(self.file.tensor(name))
        if one.start == self.start:
            return None
        assert self.reload_seconds is not None
        shares, n = self.depth.shares, len(one.sequences)
        if one.start < self.start:
            self._take(self.reload_seconds)
            self.start = 0
        if one.start:
            captured = shares[self.start] - shares[one.start]
            self._take(self.reload_seconds + self.each * (n * captured + shares[one.start]))
            self.start = 0 if self.refuses else one.start
            self.starts.append(one.start)
        return "it will not" if self.start != one.start else None


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    return write_tiny_model(folder / "deep.gguf", weight_type="F16", n_layers=24)


def _run(
    model: Path, folder: Path, seconds: float, **costs: Any
) -> tuple[Sensitivity, Passes, list[str]]:
    said: list[str] = []
    request = TokenRequest(encoder="search", n_ctx=N_CTX, seconds=seconds)
    with open_gguf(model) as file:
        given = {"loading": 1.0, "drawing": 0.01, "each": 0.05, "encoding": 1e-6, **costs}
        passes = Passes(file, **given)
        found = measure_alpha(
            file,
            request,
            nullcontext(passes),
            journal_path=folder / "journal",
            progress=Silent(),
            announce=said.append,
            timer=Timer(seconds, clock=lambda: passes.now),
        )
    assert found.seconds == pytest.approx(passes.now)
    return found, passes, said


def test_what_no_probe_suits_gets_the_sensitivity_of_its_role_and_can_be_planned(
    tmp_path: Path,
) -> None:
    out, rng = GGUFWriter(tmp_path / "m.gguf", "llama"), np.random.default_rng(0)
    out.add_block_count(2)
    for layer, width in ((0, 64), (1, 48)):  # rows of 48 suit no block
        weights = rng.standard_normal((96, width), dtype=np.float32)
        out.add_tensor(f"blk.{layer}.ffn_up.weight", weights)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    found, _, _ = _run(tmp_path / "m.gguf", tmp_path, 100.0)
    read, other = found.tensors
    assert (read.origin, other.origin) == ("measured", "role")
    assert other.alpha / other.n_weights == pytest.approx(read.alpha / read.n_weights)
    measured = ramgguf.measure(tmp_path / "m.gguf", threads=1)
    plan = ramgguf.plan(measured, "55%", sensitivity=found, min_sqnr_db=0)
    assert plan.assignments[1].format == "F16"


def _origins(found: Sensitivity) -> dict[str, int]:
    origins = [t.origin for t in found.tensors]
    return {o: origins.count(o) for o in ("measured", "carried", "interpolated", "role")}


@pytest.mark.parametrize("seconds", [6.0, 8.0, 12.0, 30.0, 300.0])
@pytest.mark.parametrize(
    "costs",
    [
        {},
        {"loading": 3.0},
        {"drawing": 0.05},  # as a model's own tokens: a sequence takes many passes
        {"encoding": 2e-5, "each": 0.01},  # as the search for scales: encoding takes most
        {"each": 0.2},
        {"each": 0.2, "reload_seconds": 0.05},
        {"reload_seconds": 3.0},  # longer than whole passes take in all
        {"each": 0.2, "tells_errors": True},
        {"each": 0.2, "reload_seconds": 0.05, "tells_errors": True},
    ],
    ids=lambda costs: "-".join(costs) or "plain",
)
def test_the_whole_run_ends_in_its_time_or_in_the_least_that_it_announced(
    deep: Path, tmp_path: Path, seconds: float, costs: dict[str, float | None]
) -> None:
    found, passes, said = _run(deep, tmp_path, seconds, **costs)
    short = [line for line in said if "the least possible here is about" in line]
    if short:
        said_before, _ = short[0].split(", loading")
        least = float(said_before.rsplit("about ", 1)[1].removesuffix(" s"))
        assert said.index(short[0]) == 0
        assert seconds <= least  # which is rounded
        assert passes.now <= TOLERANCE * least
    else:
        assert passes.now <= TOLERANCE * seconds
    assert found.tokens.n_sequences >= 1
    assert _origins(found)["measured"] > 20


@pytest.mark.parametrize("reload_seconds", [None, 0.05])
def test_a_time_that_suffices_measures_all_tensors_on_all_sequences(
    deep: Path, tmp_path: Path, reload_seconds: float | None
) -> None:
    found, passes, said = _run(deep, tmp_path, 300.0, reload_seconds=reload_seconds)
    assert _origins(found)["measured"] == len(found.tensors)
    assert found.tokens.n_sequences == 4
    assert not found.notes
    promised = said[-1].rsplit("about ", 1)[1]
    minutes, _, rest = promised.removesuffix(" s").rpartition(" min ")
    assert 60 * float(minutes or 0) + float(rest) == pytest.approx(passes.now, rel=0.1)


@pytest.mark.parametrize("reload_seconds", [None, 0.02])
def test_a_machine_that_gets_slower_ends_readings_early_and_the_rest_is_imputed(
    deep: Path, tmp_path: Path, reload_seconds: float | None
) -> None:
    found, passes, _ = _run(
        deep, tmp_path, 12.0, slow_from=40, slower=4.0, reload_seconds=reload_seconds
    )
    assert passes.now <= TOLERANCE * 12.0
    assert any(note.startswith("the time was over after ") for note in found.notes)
    origins = _origins(found)
    assert origins["measured"] >= 40
    assert origins["interpolated"] > 0
    depths = {t.layer for t in found.tensors if t.origin == "measured" and t.layer is not None}
    assert {0, 1, 22, 23} < depths  # the ends, and some of those between
    assert all(math.isfinite(t.alpha) and t.alpha > 0 for t in found.tensors)


def test_a_run_goes_on_from_readings_that_its_time_cut_off(deep: Path, tmp_path: Path) -> None:
    found, _, _ = _run(deep, tmp_path, 12.0, slow_from=40, slower=4.0)
    again, passes, said = _run(deep, tmp_path, 60.0)
    assert passes.now < 60
    assert _origins(again)["measured"] > _origins(found)["measured"]
    assert re.search(r"; \d+ tensors done already$", said[0])


def test_where_the_time_does_not_reach_alpha_is_carried_from_every_fourth_layer(
    deep: Path, tmp_path: Path
) -> None:
    costs = {"each": 1.0, "reload_seconds": 0.02}
    (tmp_path / "all").mkdir()
    whole, all_of_them, _ = _run(deep, tmp_path / "all", 1e4, **costs, tells_errors=True)
    assert _origins(whole)["measured"] == len(whole.tensors)
    assert len(all_of_them.ends) == 1  # tried once
    seconds = 0.85 * all_of_them.now / 4  # one sequence does not fit
    found, passes, said = _run(deep, tmp_path, seconds, **costs, tells_errors=True)
    origins = _origins(found)
    assert origins["interpolated"] == origins["role"] == 0
    assert origins["carried"] > 0.5 * len(found.tensors)
    assert passes.now <= seconds * TOLERANCE
    assert {t.origin for t in found.tensors if t.role == "ffn_down"} == {"measured"}
    assert all(t.layer_reading is not None for t in found.tensors if t.origin == "carried")
    assert any("carried or interpolated within their role" in note for note in found.notes)
    promised = next(line for line in said if "sequence of" in line).rsplit("about ", 1)[1]
    minutes, _, rest = promised.removesuffix(" s").rpartition(" min ")
    assert 60 * float(minutes or 0) + float(rest) == pytest.approx(passes.now, rel=0.1)


def test_a_run_that_carries_goes_on_from_its_readings(deep: Path, tmp_path: Path) -> None:
    costs = {"each": 1.0, "reload_seconds": 0.02, "tells_errors": True}
    found, passes, _ = _run(deep, tmp_path, 87.0, **costs)
    assert _origins(found)["carried"] > 0
    journal = tmp_path / "journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]))
    again, rest, said = _run(deep, tmp_path, 87.0, **costs)
    assert again.tensors == found.tensors
    assert 0 < rest.n_read < 0.6 * passes.n_read
    assert re.search(r"; \d+ tensors done already$", said[0])


def test_passes_begin_at_several_layers_in_turn_and_take_much_less_time(
    deep: Path, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    _, whole, _ = _run(deep, tmp_path / "whole", 2000.0, each=1.0)
    found, passes, _ = _run(deep, tmp_path, 2000.0, each=1.0, reload_seconds=0.1)
    assert _origins(found)["measured"] == len(found.tensors)
    assert whole.starts == []
    assert len(set(passes.starts)) > 4
    turns = sum(b < a for a, b in pairwise(passes.starts))
    assert turns == 1  # the ends come before the others
    assert passes.now < 0.7 * whole.now
    names = [t.name for t in found.tensors]
    with open_gguf(deep) as file:
        assert names == [t.name for t in file.tensors if len(t.shape) == 2]


def test_a_model_that_cannot_begin_later_is_tried_once_and_read_by_whole_passes(
    deep: Path, tmp_path: Path
) -> None:
    found, passes, said = _run(deep, tmp_path, 2000.0, each=0.5, reload_seconds=0.1, refuses=True)
    assert _origins(found)["measured"] == len(found.tensors)
    assert len(passes.starts) == 1
    assert [line for line in said if "first layer" in line] == [
        "passes begin at the first layer: it will not"
    ]


def test_the_starts_are_those_of_least_time_and_at_whole_periods(deep: Path) -> None:
    with open_gguf(deep) as file:
        depth = Depth.of(file)
        passes = [TensorPass(t) for t in file.tensors if len(t.shape) == 2]
    assert depth.shares[0] == 1.0
    assert all(a > b > 0 for a, b in pairwise(depth.shares))
    costs = Costs(0.0, 1.0, 0.0, reload=0.2)
    planned = Starts.planned(depth, costs, 2, passes)
    least = planned.seconds(by_start(planned, passes))[-1]
    for k in range(1, 8):  # equal parts, of any number, take no less
        layers = tuple(sorted({24 * i // k for i in range(k)}))
        equal = Starts(depth, costs, 2, layers)
        assert equal.seconds(by_start(equal, passes))[-1] >= least - 1e-9
    assert Starts.planned(depth, Costs(0.0, 1.0, 0.0), 2, passes).layers == (0,)
    assert Starts.planned(depth, Costs(0.0, 1.0, 0.0, reload=1e6), 2, passes).layers == (0,)
    sixes = Starts.planned(replace(depth, period=6), costs, 2, passes)
    assert set(sixes.layers) <= {0, 6, 12, 18}
    assert len(sixes.layers) > 2


def by_start(starts: Starts, passes: Sequence[TensorPass]) -> list[TensorPass]:
    return sorted(passes, key=lambda one: starts.start(one.tensor))


@pytest.mark.parametrize("n", [0, 1, 2, 5, 22])
def test_any_first_few_of_a_spread_order_are_spread(n: int) -> None:
    order = spread_order(n)
    assert sorted(order) == list(range(n))
    for k in (2, 4, 8):
        if k <= n:
            gaps = np.diff(sorted([*order[:k], n]))
            assert gaps.max() <= math.ceil(n / k) + 1
