"""Formats that are slow to encode are tried where a plan could take them, and nowhere else."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

import ramgguf
from gguf_samples import finish_gguf
from ramgguf.core.progress import Silent
from ramgguf.gguf.reader import open_gguf
from ramgguf.measure import measure_file
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan import PlanOptions
from ramgguf.quantize.preselection import measure_and_plan, with_least_errors
from ramgguf.quants import formats

SLOW = "IQ1_M"
QUICK = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0")
OPTIONS = PlanOptions(min_sqnr_db=0)


class _Slow:
    """Measures a model in quick formats, and has an error of the slow one for those who ask."""

    def __init__(self, source: Path, share: float) -> None:
        self.tried: set[str] = set()
        self._source, self._share = source, share

    def __call__(
        self, *, sampled: bool = False, slow: bool = True, only: Any = None, others: bool = True
    ) -> Measurement:
        with open_gguf(self._source) as file:
            found = measure_file(
                file, n_overhead_bytes=0, wanted=QUICK, encoder="search", sampled=sampled,
                only=only, others=others, threads=1, progress=Silent(),
            )  # fmt: skip
        asks = slow and (sampled or only is None)
        tensors = tuple(self._with_slow(t, only) if asks else t for t in found.tensors)
        return found.model_copy(update={"formats": (*found.formats, SLOW), "tensors": tensors})

    def _with_slow(self, tensor: TensorMeasurement, only: Any) -> TensorMeasurement:
        if tensor.kept or (only is not None and SLOW not in only.get(tensor.name, ())):
            return tensor
        self.tried.add(tensor.name)
        n_bytes = formats.row_bytes(SLOW, tensor.shape[0]) * tensor.shape[1]
        rng = np.random.default_rng(len(tensor.name))
        point = Point(SLOW, n_bytes, self._share * float(rng.uniform(0.22, 0.33)), 0.0)
        return tensor.model_copy(update={"points": (point, *tensor.points)})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rng = tmp_path_factory.mktemp("slow") / "a.gguf", np.random.default_rng(3)
    out = GGUFWriter(path, "llama")
    out.add_block_count(4)
    for layer in range(4):
        for part in ("ffn_up", "ffn_down", "attn_v"):
            scale = float(rng.uniform(0.5, 2))
            weights = (scale * rng.standard_t(5, (256, 512))).astype(np.float16)
            out.add_tensor(f"blk.{layer}.{part}.weight", weights)
    finish_gguf(out)
    return path


@pytest.mark.parametrize(
    ("budget", "share", "all_tried"),
    [("4.5bpw", 1.0, False), ("3.0bpw", 1.0, False), ("2.9bpw", 1.5, False), ("2.0bpw", 1, True)],
)
def test_a_slow_format_is_tried_where_it_may_serve_and_the_plan_is_that_of_all_formats(
    budget: str, share: float, all_tried: bool, model: Path
) -> None:
    measure, every = _Slow(model, share), _Slow(model, share)
    planned = partial(ramgguf.plan, budget=budget, **OPTIONS)
    _, made = measure_and_plan(measure, planned, OPTIONS, lambda _: nullcontext(), preselects=True)
    best = planned(every())
    assert made.total_cost <= 1.02 * best.total_cost
    assert (measure.tried == every.tried) == all_tried
    if budget == "4.5bpw":
        assert measure.tried == set()


def test_the_least_error_to_expect_follows_from_larger_formats(model: Path) -> None:
    tensor = next(t for t in _Slow(model, 1.0)(slow=False).tensors if "ffn_up" in t.name)
    guessed = with_least_errors(tensor, [SLOW], share=1.0)
    (point,) = set(guessed.points) - set(tensor.points)
    bits = {p.format: 8 * p.n_bytes / np.prod(tensor.shape) for p in guessed.points}
    least = min(
        p.nmse * 4 ** (bits[p.format] - bits[SLOW])
        for p in tensor.points
        if p.format != tensor.source_format
    )
    assert point.nmse == pytest.approx(least)
    assert with_least_errors(tensor.model_copy(update={"excluded": {SLOW: "why"}}), [SLOW]) == (
        tensor.model_copy(update={"excluded": {SLOW: "why"}})
    )
