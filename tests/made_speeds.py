"""Speeds of formats made up: as fast as memory gives bytes, some slower by a factor."""

from collections.abc import Mapping

from ramgguf.llama.format_speed import FormatRate, SpeedProfile
from ramgguf.llama.protocol import SystemInfo
from ramgguf.quants import formats

SYSTEM = SystemInfo(llama_cpp_python="0", build="0", system_info="", cpu="a made-up CPU")


def made_speeds(
    slower: Mapping[str, float] | None = None,
    *,
    bytes_per_second: float = 1e9,
    prompt_seconds: Mapping[str, float] | None = None,
    layer_seconds: float = 0.0,
    without: tuple[str, ...] = (),
) -> SpeedProfile:
    """Return a profile: slower multiplies what a format's bytes take, prompts take 1 ns a weight.

    prompt_seconds are of a weight, by format; without are formats that do not run.
    """
    names = [n for n in formats.known() if n not in without]
    rates = {
        name: FormatRate(
            generation=formats.get(name).bpw / 8 / bytes_per_second * (slower or {}).get(name, 1),
            prompt=(prompt_seconds or {}).get(name, 1e-9),
        )
        for name in names
    }
    return SpeedProfile(
        ramgguf_version="0",
        cpu=SYSTEM.cpu,
        n_threads=1,
        engine="0",
        system=SYSTEM,
        n_prompt=64,
        n_rounds=1,
        n_bytes=1 << 20,
        reference_seconds=1.0,
        reference_prompt_seconds=1.0,
        layer_seconds=layer_seconds,
        layer_prompt_seconds=0.0,
        rates=rates,
        refused=dict.fromkeys(without, "it is made up"),
    )
