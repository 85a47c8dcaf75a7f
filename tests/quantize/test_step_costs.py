"""What the steps of an effort are taken to cost."""

from pathlib import Path

import pytest

from ramgguf.gguf.reader import open_gguf
from ramgguf.quantize.step_costs import SCALE_READS, scale_seconds
from small_models import ARCHITECTURES, write_small_model


@pytest.mark.parametrize(("name", "checks"), [("llama", 1), ("qwen3moe", 2), ("mamba", 0)])
def test_scales_of_mixtures_take_the_time_of_two_checks(
    name: str, checks: int, tmp_path: Path
) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    with open_gguf(write_small_model(tmp_path / "m.gguf", architecture)) as file:
        found = scale_seconds(file, write=3.0, sequence=2.0)
    assert found == pytest.approx(checks * (3.0 + 2.0 * SCALE_READS))
