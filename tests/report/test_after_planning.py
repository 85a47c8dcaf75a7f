"""What was done once the formats were chosen stands on every page of a plan."""

from io import StringIO

from rich.console import Console

from made_plans import made_measurement, made_plan
from ramgguf.plan.result import QuantizedInputs
from ramgguf.report.notebook import drawing
from ramgguf.report.plans import after_planning, print_plan

SAID = (
    "rounded layer by layer for the inputs that quantized layers leave, on 24 × 512 tokens of mix"
)


def test_a_plan_says_for_which_inputs_its_weights_were_rounded() -> None:
    plain = made_plan(made_measurement(4))
    assert list(after_planning(plain)) == []
    inputs = QuantizedInputs(tokens="mix", n_sequences=24, n_ctx=512)
    plan = plain.model_copy(update={"quantized_inputs": inputs})
    assert list(after_planning(plan)) == [SAID]
    out = StringIO()
    print_plan(plan, Console(file=out, width=200))
    assert SAID in out.getvalue()
    shown = drawing(plan)
    assert shown is not None
    assert SAID in shown
