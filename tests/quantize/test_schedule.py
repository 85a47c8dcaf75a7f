"""The schedule of an effort: it keeps to the time, and shrinks steps before it leaves them out."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramgguf.quantize.schedule import (
    EFFORTS,
    LAYER_GRAMS,
    LAYER_READS,
    LAYER_SEQUENCES,
    SWAPS_LEFT_OUT,
    Costs,
    Effort,
    Kept,
    Schedule,
    Step,
    rounds_within,
    schedule,
)

# smol768 on two idle cores, in seconds.
IDLE = Costs(
    write=12.0,
    read=1.2,
    gram=1.0,
    feedback=20.0,
    descent=45.0,
    hessian_bytes=500_000_000,
    window=0.6,
)


def _busy(factor: float) -> Costs:
    """What the same steps cost on a machine that is so many times as slow."""
    return replace(
        IDLE,
        write=factor * IDLE.write,
        read=factor * IDLE.read,
        gram=factor * IDLE.gram,
        feedback=factor * IDLE.feedback,
        descent=factor * IDLE.descent,
        window=factor * IDLE.window,
    )


def _names(found: Schedule) -> list[str]:
    return [step.name for step in found.steps]


def _step(found: Schedule, name: str) -> Step:
    return next(step for step in found.steps if step.name == name)


def test_on_an_idle_machine_auto_has_all_its_steps_within_five_minutes() -> None:
    found = schedule("auto", 300, IDLE, Kept(), "mix")
    assert _names(found) == ["importance matrix", "error feedback", "massive activations"]
    assert found.n_sequences >= 32
    assert found.seconds <= 300
    assert [line.split(":")[0] for line in found.left_out] == ["quantized inputs"]


@pytest.mark.parametrize("factor", [2, 4, 6, 8, 10])
def test_on_a_busy_machine_tokens_and_gates_get_fewer_before_the_matrix_goes(factor: float) -> None:
    found = schedule("auto", 300, _busy(factor), Kept(), "mix")
    assert _names(found)[0] == "importance matrix"
    assert found.seconds <= 300
    at_leisure = schedule("auto", 1e9, IDLE, Kept(), "mix")
    assert (found.n_sequences, found.n_rounds) < (at_leisure.n_sequences, at_leisure.n_rounds)
    if factor > 2:
        faster = schedule("auto", 300, _busy(factor / 2), Kept(), "mix")
        assert "error feedback" in _names(faster) or found.n_sequences < faster.n_sequences


def test_the_last_resort_is_one_sequence_and_one_round_and_then_the_line_says_what_it_takes() -> (
    None
):
    least = schedule("auto", 1e9, IDLE, Kept(), "mix")
    assert least.n_sequences == 48  # more bring little
    assert schedule("best", 1e9, IDLE, Kept(), "mix").n_sequences == 64
    needed = IDLE.write + IDLE.read + 3 * IDLE.round
    just = schedule("auto", needed * 1.001, IDLE, Kept(), "mix")
    assert (just.n_sequences, just.n_rounds) == (1, 1)
    short = schedule("auto", needed * 0.999, IDLE, Kept(), "mix")
    assert short.steps == ()
    assert "importance matrix: left out" in short.left_out[0]
    assert "--time" in short.left_out[0]


def test_passes_for_a_matrix_make_no_hessians_where_error_feedback_does_not_fit() -> None:
    found = schedule("auto", 300, replace(IDLE, feedback=600.0, descent=1200.0), Kept(), "mix")
    assert not found.with_hessians
    assert _step(found, "importance matrix").measuring == found.n_sequences * IDLE.read


def test_time_that_is_over_leaves_everything_out() -> None:
    assert schedule("best", -5.0, IDLE, Kept(), "mix").steps == ()


def test_what_is_kept_costs_nothing_and_only_that() -> None:
    anew = schedule("best", 1e9, IDLE, Kept(), "mix")
    matrix = schedule("best", 1e9, IDLE, Kept(matrix=64), "mix")
    assert anew.with_hessians
    assert _step(anew, "importance matrix").measuring == 64 * (IDLE.read + IDLE.gram)
    assert _step(anew, "error feedback").measuring == 0
    # A kept matrix says nothing of its Hessians.
    assert not matrix.with_hessians
    assert _step(matrix, "importance matrix").measuring == 0
    assert _step(matrix, "error feedback").measuring == 64 * (IDLE.read + IDLE.gram)
    both = schedule("best", 1e9, IDLE, Kept(matrix=64, hessian=True), "mix")
    assert _step(both, "error feedback").measuring == 0
    kept = Kept(matrix=64, hessian=True, sensitivity=True, massive=True)
    everything = schedule("best", 1e9, IDLE, kept, "mix")
    assert [s.measuring for s in everything.steps[:-1]] == [0, 0, 0, 0]
    layers = everything.steps[-1]  # of each file anew
    assert layers.name == "quantized inputs"
    assert layers.measuring > 0


def test_a_kept_matrix_serves_where_the_time_allows_up_to_twice_its_tokens() -> None:
    assert schedule("auto", 1e9, IDLE, Kept(matrix=24), "mix").n_sequences == 24
    assert schedule("auto", 1e9, IDLE, Kept(matrix=23), "mix").n_sequences == 48


def test_error_feedback_shrinks_the_matrix_rather_than_go_without_it() -> None:
    costs = replace(IDLE, feedback=150.0, descent=300.0)
    found = schedule("auto", 300, costs, Kept(), "mix")
    assert "error feedback" in _names(found)
    assert found.n_sequences < 48
    dear = schedule("auto", 300, replace(IDLE, feedback=600.0, descent=1200.0), Kept(), "mix")
    assert _names(dear) == ["importance matrix", "massive activations"]
    assert any("error feedback: left out" in line for line in dear.left_out)
    assert dear.n_sequences > found.n_sequences


def test_coordinate_descent_follows_the_feedback_where_no_tokens_yield_to_it() -> None:
    costs = replace(IDLE, feedback=60.0, descent=180.0)
    assert schedule("best", 1e9, costs, Kept(), "mix").encoder == "descent"
    assert schedule("auto", 1e9, costs, Kept(), "mix").encoder == "descent"
    tight = schedule("auto", 300, costs, Kept(), "mix")
    assert tight.encoder == "gptq"
    assert "error feedback" in _names(tight)


def test_massive_activations_yield_to_error_feedback_where_both_do_not_fit() -> None:
    costs = replace(IDLE, feedback=20.0)
    feedback = costs.feedback + costs.write + 6 * costs.round
    matrix = 16 * (costs.read + costs.gram) + costs.write + 9 * costs.round
    found = schedule("auto", matrix + feedback + 1, costs, Kept(), "mix")
    assert _names(found) == ["importance matrix", "error feedback"]
    line = found.left_out[0]
    assert line.startswith("massive activations: left out")


def test_hessians_that_the_disk_does_not_hold_are_left_out_and_the_line_says_so() -> None:
    found = schedule("auto", 300, IDLE, Kept(free_bytes=600_000_000), "mix")
    assert "error feedback" not in _names(found)
    assert "500 MB of disk" in found.left_out[-1]


def test_best_has_every_step_and_gives_sensitivities_a_share_of_a_given_time() -> None:
    free = schedule("best", 1e9, IDLE, Kept(), "mix")
    assert _names(free) == [
        "importance matrix", "massive activations", "sensitivities", "error feedback",
        "quantized inputs",
    ]  # fmt: skip
    assert free.left_out == (SWAPS_LEFT_OUT,)
    assert _step(free, "sensitivities").measuring == 1200
    timed = schedule("best", 900, IDLE, Kept(), "mix")
    assert timed.seconds <= 900
    assert 0 < _step(timed, "sensitivities").measuring < 300


def test_sensitivities_yield_to_error_feedback_and_to_its_tokens() -> None:
    """Error feedback brings ten times as much (docs/effort.md)."""
    costs = replace(_busy(2), feedback=100.0, descent=200.0)
    tight = schedule("best", 400, costs, Kept(), "mix")
    assert "error feedback" in _names(tight)
    assert "sensitivities" not in _names(tight)
    assert any(line.startswith("sensitivities: left out, error") for line in tight.left_out)
    # The same time without them is what auto has: best is no worse.
    auto = schedule("auto", 400, costs, Kept(), "mix")
    assert tight.n_sequences >= auto.n_sequences
    roomy = schedule("best", 900, costs, Kept(), "mix")
    assert {"sensitivities", "error feedback"} <= set(_names(roomy))
    assert roomy.n_sequences >= 32
    # Where error feedback does not fit at all, they have its time.
    dear = replace(costs, feedback=5000.0, descent=9000.0)
    assert "sensitivities" in _names(schedule("best", 900, dear, Kept(), "mix"))


def test_a_late_step_gets_a_shorter_gate_before_it_is_left_out() -> None:
    costs = replace(IDLE, keeps_reference=True)
    step = _step(schedule("best", 1e9, costs, Kept(), "mix"), "error feedback")
    assert rounds_within(step, 6, step.seconds, costs) == 6
    assert rounds_within(step, 6, step.seconds - 0.5 * costs.round, costs) == 5
    assert rounds_within(step, 6, step.seconds - 4.5 * costs.round, costs) == 1
    assert rounds_within(step, 6, step.seconds - 5.5 * costs.round, costs) == 0
    # Where the source is read again, its windows are saved as well.
    both = costs.round + costs.source_round
    again = replace(costs, keeps_reference=False)
    assert rounds_within(step, 6, step.seconds - 1.5 * both, again) == 4


def test_saving_hessians_takes_time() -> None:
    found = schedule("best", 1e9, replace(IDLE, save=7.0), Kept(), "mix")
    without = schedule("best", 1e9, IDLE, Kept(), "mix")
    assert found.seconds == without.seconds + 7
    kept = Kept(matrix=64, hessian=True)
    assert schedule("best", 1e9, replace(IDLE, save=7.0), kept, "mix").seconds == pytest.approx(
        schedule("best", 1e9, IDLE, kept, "mix").seconds
    )


def test_swaps_are_tried_where_no_error_feedback_follows_the_plan() -> None:
    found = schedule("best", 1e9, IDLE, Kept(free_bytes=600_000_000), "mix")
    assert _names(found) == [
        "importance matrix", "massive activations", "sensitivities", "swaps",
    ]  # fmt: skip
    assert not any(line.startswith("swaps") for line in found.left_out)


@given(
    st.sampled_from(EFFORTS[1:]),
    st.floats(0, 1e5),
    st.floats(0.01, 1e4),
    st.floats(0.001, 1e3),
    st.floats(0, 1e3),
    st.floats(0, 1e5),
    st.integers(0, 80),
    st.booleans(),
)
def test_a_schedule_never_takes_more_than_the_limit_nor_a_step_twice(
    effort: Effort,
    limit: float,
    write: float,
    read: float,
    gram: float,
    feedback: float,
    matrix: int,
    hessian: bool,
) -> None:
    costs = Costs(write, read, gram, feedback, 2 * feedback, 1000, read / 2)
    found = schedule(effort, limit, costs, Kept(matrix, hessian and matrix > 0), "mix")
    assert found.seconds <= limit + 1e-6
    assert len(set(_names(found))) == len(found.steps)
    told = {line.split(":")[0] for line in found.left_out}
    assert told.isdisjoint(_names(found))
    assert _names(found)[:1] in ([], ["importance matrix"])
    if found.steps:
        every = (3 if effort == "auto" else 5) + ("error feedback" in _names(found))
        assert len(found.steps) + len(told) == every


def test_gates_after_the_first_read_the_candidate_alone_where_the_reference_is_kept() -> None:
    both = schedule("auto", 1e9, IDLE, Kept(), "mix")
    kept = schedule("auto", 1e9, replace(IDLE, keeps_reference=True), Kept(), "mix")
    assert kept.n_rounds == both.n_rounds
    a_model = both.n_rounds * IDLE.round
    for name, saved in (("importance matrix", 0), ("error feedback", a_model)):
        saving = _step(both, name).seconds - _step(kept, name).seconds
        assert saving == pytest.approx(saved)


def test_quantized_inputs_come_last_and_only_after_error_feedback_with_its_tokens() -> None:
    found = schedule("auto", 1e9, IDLE, Kept(), "mix")
    assert _names(found)[-1] == "quantized inputs"
    step = _step(found, "quantized inputs")
    tokens = LAYER_SEQUENCES * (LAYER_READS * IDLE.read + LAYER_GRAMS * IDLE.gram)
    assert step.measuring == tokens
    assert step.seconds > tokens + IDLE.descent
    # Other steps, and their tokens, are those of a time in which it does not fit.
    short = schedule("auto", found.seconds - 1, IDLE, Kept(), "mix")
    assert _names(short) == _names(found)[:-1]
    assert short.n_sequences == found.n_sequences
    assert any(line.startswith("quantized inputs: left out") for line in short.left_out)
    without = schedule("auto", 1e9, IDLE, Kept(free_bytes=600_000_000), "mix")
    assert "error feedback" not in _names(without)
    assert not any("quantized inputs" in line for line in (*_names(without), *without.left_out))


def test_sensitivities_yield_to_quantized_inputs_where_both_do_not_fit() -> None:
    """These bring × 0.87 to 0.99, sensitivities 0.96 to 0.99 (docs/effort.md)."""
    both = schedule("best", 900, IDLE, Kept(), "mix")
    assert {"sensitivities", "quantized inputs"} <= set(_names(both))
    one = schedule("best", 600, IDLE, Kept(), "mix")
    assert "quantized inputs" in _names(one)
    assert "sensitivities" not in _names(one)
    assert any(line.startswith("sensitivities: left out, error") for line in one.left_out)
    assert one.n_sequences >= 32
    assert one.seconds <= 600
    neither = schedule("best", 400, IDLE, Kept(), "mix")  # sensitivities have the time then
    assert "quantized inputs" not in _names(neither)
    assert "sensitivities" in _names(neither)
    # auto does not give up what it has for them.
    auto = schedule("auto", 300, IDLE, Kept(), "mix")
    assert "massive activations" in _names(auto)
    assert auto.encoder == "descent"
