"""Plans that are bound by tokens per second: predicted from what formats take on a machine."""

from pathlib import Path
from typing import Any

import pytest

import ramgguf
import small_models
from made_speeds import made_speeds
from ramgguf.core.errors import BudgetError
from ramgguf.gguf.reader import open_gguf
from ramgguf.plan import SpeedLimit, TokenWork
from ramgguf.plan.result import Plan
from small_models import N_EXPERTS, write_small_model
from synthetic import measurement

LAYERS = 4
M = measurement(LAYERS)
WORK = TokenWork(LAYERS, {}, {})
# Of as many bits as IQ4_XS or nearly so, and slow.
SLOW = {"IQ4_XS": 3.0, "Q5_K": 2.0}


def _plan(budget: str, limit: SpeedLimit | None, **options: Any) -> Plan:
    return ramgguf.plan(M, budget, speed=limit, **options)


def _speed(plan: Plan, limit: SpeedLimit) -> tuple[float, float]:
    return limit.predicted((a.name, a.n_weights, a.format) for a in plan.assignments)


def test_a_plan_keeps_to_the_least_speed_and_is_better_than_a_smaller_one() -> None:
    profile = made_speeds(SLOW, layer_seconds=1e-5)
    free = SpeedLimit(profile, WORK, 1e-3)
    plain = _plan("6bpw", None)
    slow, _ = _speed(plain, free)
    limit = SpeedLimit(profile, WORK, 1.15 * slow)
    bound = _plan("6bpw", limit)
    assert bound.speed is not None
    assert bound.speed.generation >= 1.15 * slow * (1 - 1e-9)
    assert bound.speed.generation == pytest.approx(_speed(bound, limit)[0])
    assert bound.n_bytes <= plain.budget
    assert bound.total_cost > plain.total_cost
    assert bound.gap < 0.01
    # Of plans by bytes alone, the first that is as fast loses more: it knows nothing of formats.
    smaller = next(
        made
        for percent in range(600, 200, -8)
        if _speed(made := _plan(f"{percent / 100}bpw", None), limit)[0] >= 1.15 * slow
    )
    assert bound.total_cost < smaller.total_cost


def test_a_limit_that_does_not_bind_changes_nothing() -> None:
    plain = _plan("5bpw", None)
    bound = _plan("5bpw", SpeedLimit(made_speeds(SLOW), WORK, 1e-3, 1e-3))
    assert bound.assignments == plain.assignments
    assert bound.gap == plain.gap


def test_prompts_are_bound_by_arithmetic_and_generation_by_bytes() -> None:
    profile = made_speeds(prompt_seconds={"Q6_K": 5e-9, "Q5_K": 5e-9})
    limit = SpeedLimit(profile, WORK, 1e-3, 1e-3)
    plain = _plan("6bpw", None)
    _, prompt = _speed(plain, limit)
    bound = _plan("6bpw", SpeedLimit(profile, WORK, 0.0, 2 * prompt))
    assert _speed(bound, limit)[1] >= 2 * prompt * (1 - 1e-9)
    chosen = [a.format for a in bound.assignments]
    assert sum(f in ("Q6_K", "Q5_K") for f in chosen) < sum(
        a.format in ("Q6_K", "Q5_K") for a in plain.assignments
    )


def test_what_is_out_of_reach_says_what_is_possible_and_what_limits_it() -> None:
    limit = SpeedLimit(made_speeds(SLOW), WORK, 1e9)
    with pytest.raises(BudgetError, match=r"generation at 1e\+09 tokens/s is out of reach") as e:
        _plan("6bpw", limit)
    said = str(e.value)
    assert "1 thread of a made-up CPU" in said
    assert "without the floor of SQNR (--min-sqnr 0) it is" in said
    assert "token_embd.weight alone" in said
    possible = float(said.partition("makes about ")[2].split()[0])
    reached = _plan("6bpw", SpeedLimit(made_speeds(SLOW), WORK, 0.99 * possible))
    assert reached.speed is not None
    assert 0.99 * possible <= reached.speed.generation <= 1.01 * possible
    with pytest.raises(BudgetError, match="out of reach"):
        _plan("6bpw", SpeedLimit(made_speeds(SLOW), WORK, 1.02 * possible))


def test_fast_formats_that_are_large_need_bytes() -> None:
    # The formats of many bits are the fast ones here.
    profile = made_speeds({"Q8_0": 0.01, "Q6_K": 0.2})
    with pytest.raises(BudgetError, match=r"out of reach.*with more bytes it is"):
        _plan("4bpw", SpeedLimit(profile, WORK, 5000.0), min_sqnr_db=0)


def test_limits_that_exclude_each_other_are_named_together() -> None:
    # Whatever generates fast reads prompts slowly.
    formats = ("Q3_K", "Q8_0", "F16")
    profile = made_speeds(
        {"Q8_0": 4, "F16": 40, "F32": 0.01}, prompt_seconds={"Q3_K": 1e-8, "Q8_0": 1e-10}
    )
    ends = []
    for least in ((1e9, 0.0), (0.0, 1e9)):
        with pytest.raises(BudgetError) as e:
            _plan("8.6bpw", SpeedLimit(profile, WORK, *least), formats=formats, min_sqnr_db=0)
        ends.append(float(str(e.value).partition("makes about ")[2].split()[0]))
    limit = SpeedLimit(profile, WORK, 0.9 * ends[0], 0.9 * ends[1])
    with pytest.raises(BudgetError, match=r"no plan within these bytes was found .* one by one"):
        _plan("8.6bpw", limit, formats=formats, min_sqnr_db=0)


def test_formats_that_do_not_run_here_are_left_out_and_named() -> None:
    plain = _plan("5bpw", None)
    used = next(a.format for a in plain.assignments if a.note is None)
    made = _plan("5bpw", SpeedLimit(made_speeds(without=(used,)), WORK, 1e-3))
    assert all(a.format != used for a in made.assignments)
    assert any(f"cannot run them: {used}" in note for note in made.notes)


def test_a_slower_machine_is_planned_for_once_it_was_timed() -> None:
    profile = made_speeds(SLOW)
    fast = _plan("6bpw", SpeedLimit(profile, WORK, 1e-3))
    assert fast.speed is not None
    least = 0.95 * fast.speed.generation
    assert _plan("6bpw", SpeedLimit(profile, WORK, least)).total_cost == fast.total_cost
    slower = _plan("6bpw", SpeedLimit(profile, WORK, least).corrected(1.2, 1.0))
    assert slower.total_cost > fast.total_cost
    assert slower.speed is not None
    assert slower.speed.generation >= least * (1 - 1e-9)


def test_a_token_meets_the_experts_that_are_active_and_no_looked_up_rows(tmp_path: Path) -> None:
    made = {a.name: a for a in small_models.ARCHITECTURES}["qwen3moe"]
    with open_gguf(write_small_model(tmp_path / "moe.gguf", made)) as file:
        work = TokenWork.of(file)
        shares = {t.name: work.generation[t.name] for t in file.tensors}
        assert shares["blk.0.ffn_down_exps.weight"] == 2 / N_EXPERTS
        assert shares["blk.0.attn_q.weight"] == 1
        assert shares["blk.0.attn_norm.weight"] == 0
        tied = file.has_tied_embedding
        assert shares["token_embd.weight"] == (1 if tied else 0)
        head = "token_embd.weight" if tied else "output.weight"
        assert work.prompt[head] == 1 / 512
