"""Plans count that llama.cpp's kernels round the inputs of quantized weights to 8 bits."""

import numpy as np
import pytest

import ggml_oracle
import ramgguf
from made_plans import made_measurement
from ramgguf.measure.result import Measurement, Point
from ramgguf.plan.input_rounding import added_nmse, rounding_nmse
from ramgguf.quants import formats

SOME_ROLES = ("attn_q", "attn_output", "ffn_up", "ffn_down", "ffn_down_exps", "head", "ssm_in")


def test_large_blocks_are_those_whose_kernels_in_ggml_round_256_inputs_together() -> None:
    for name in formats.known():
        n = ggml_oracle.inputs_block_size(name)
        if name in formats.FLOAT_FORMATS:
            assert n == 1
            assert rounding_nmse("ffn_down", name) == 0
        else:
            large = rounding_nmse("ffn_down", "Q4_K"), rounding_nmse("ffn_down", "Q8_0")
            assert rounding_nmse("ffn_down", name) == large[n == 32], name
            assert n in (32, 256)


@pytest.mark.parametrize("role", SOME_ROLES)
def test_blocks_of_256_lose_more_than_blocks_of_32(role: str) -> None:
    assert 1e-5 < rounding_nmse(role, "Q8_0") < rounding_nmse(role, "Q6_K") < 1e-3


def test_an_embedding_that_is_looked_up_loses_nothing() -> None:
    assert rounding_nmse("embedding", "Q6_K") == 0 < rounding_nmse("tied_embedding", "Q6_K")


def _same_errors(*names: str) -> Measurement:
    """Return a made measurement whose tensors have these formats, all with one NMSE."""
    found = made_measurement(4)
    tensors = tuple(
        t.model_copy(
            update={
                "points": tuple(
                    p if p.format == "F16" else type(p)(p.format, p.n_bytes, 2e-4, 0.1)
                    for p in t.points
                    if p.format in ("F16", *names)
                )
            }
        )
        for t in found.tensors
    )
    return found.model_copy(update={"tensors": tensors})


def test_where_weights_lose_alike_a_plan_takes_the_format_that_rounds_less() -> None:
    found = _same_errors("Q6_K", "Q8_0")
    budget = found.n_overhead_bytes + sum(t.n_weights * 17 // 16 + 64 for t in found.tensors)
    plan = ramgguf.plan(found, budget)
    assert "Q6_K" not in {a.format for a in plan.assignments if a.role == "ffn_down"}
    by_weights = ramgguf.plan(found, budget, objective="nmse")
    assert "Q8_0" not in {a.format for a in by_weights.assignments}


def test_what_holds_the_weights_exactly_is_kept_at_no_cost() -> None:
    tensor = next(t for t in _same_errors("Q4_K", "Q8_0").tensors if t.role == "ffn_down")
    points = {p.format: p for p in tensor.points}
    exact = Point("Q4_K", points["Q4_K"].n_bytes, 0.0, 0.0)
    assert added_nmse(tensor, points["F16"]) == added_nmse(tensor, exact) == 0
    assert added_nmse(tensor, points["Q4_K"]) > 0
    on_grid = tensor.model_copy(update={"grid": "Q4_K"})
    assert added_nmse(on_grid, points["Q4_K"]) == 0


@pytest.mark.parametrize("block", [32, 256])
def test_the_size_is_that_of_rounded_normal_numbers(block: int) -> None:
    """Inputs have heavier tails than these: what is taken must be more, and not by much."""
    x = np.random.default_rng(0).normal(size=(64, block))
    step = np.abs(x).max(1, keepdims=True) / 127
    of_normal = np.square(x - np.round(x / step) * step).sum() / np.square(x).sum()
    name = "Q8_0" if block == 32 else "Q6_K"
    assert of_normal / 2 < rounding_nmse("ffn_down", name) < 20 * of_normal
