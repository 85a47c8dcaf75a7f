"""The deployment test: what fits and talks passes, what does not fails, and it says why."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bigram_model import write_bigram_model
from ramgguf.cli.app import app
from ramgguf.core.errors import EngineError, GGUFError
from ramgguf.core.machine import Available
from ramgguf.deploy.checking import CheckRequest, check_file
from ramgguf.deploy.collapse_checks import KNOWN_TEXT, distinct_share, perplexity, signs
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.result import CheckResult, Spread
from ramgguf.llama import chat_template
from ramgguf.llama.chat_template import Chats, RenderedChats, rendered
from ramgguf.llama.child import Child
from ramgguf.llama.limits import limiter
from ramgguf.llama.trial import Deployed
from ramgguf.llama.trial_protocol import Asked, Conversation, Load, Loaded, Scored, ScoreText, Talk
from ramgguf.report.check import markdown, ratios, verdict

pytest.importorskip("llama_cpp")

ENOUGH = Available(500_000_000, "a test")


def _request(n_ctx: int = 512, limit: Available = ENOUGH) -> CheckRequest:
    return CheckRequest(ContextShape(n_ctx), limit, n_threads=1, n_repeats=2, n_prompt=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("check")


@pytest.fixture(scope="module")
def good(folder: Path) -> Path:
    return write_bigram_model(folder / "good.gguf")


@pytest.fixture(scope="module")
def babbling(folder: Path) -> Path:
    return write_bigram_model(folder / "babbling.gguf", noise=12)


@pytest.fixture(scope="module")
def passed(good: Path) -> CheckResult:
    return check_file(good, _request())


def test_a_file_that_fits_and_talks_passes(passed: CheckResult) -> None:
    assert passed.failures == ()
    assert passed.passed
    assert passed.failed_stage is None
    assert passed.advice == ()
    assert verdict(passed).startswith("PASS")


def test_what_was_measured_is_plausible(passed: CheckResult) -> None:
    assert passed.load_seconds is not None
    assert 0 < passed.load_seconds < 60
    assert passed.peak_bytes is not None
    assert passed.margin == passed.limit - passed.peak_bytes
    assert passed.planned.weights + passed.planned.cache < passed.peak_bytes < 300_000_000
    assert passed.speed is not None
    assert passed.speed.generation is not None
    assert passed.speed.generation_full is not None
    assert passed.speed.prompt.n == passed.speed.generation.n == 2
    for spread in (passed.speed.prompt, passed.speed.generation):
        assert 0 < spread.low <= spread.median <= spread.high
    assert passed.speed.generation_full > 0
    assert passed.system is not None


def test_the_answers_are_kept_and_the_known_text_is_known(passed: CheckResult) -> None:
    assert len(passed.answers) == 5
    assert all(not a.signs for a in passed.answers)
    assert passed.known_ppl is not None
    assert 1.5 < passed.known_ppl < 12


def test_the_result_survives_its_file(passed: CheckResult, tmp_path: Path) -> None:
    passed.save(tmp_path / "check.json")
    assert CheckResult.load(tmp_path / "check.json") == passed


def test_a_file_that_babbles_is_caught(babbling: Path, good: Path) -> None:
    found = check_file(babbling, _request(), reference=good)
    assert not found.passed
    assert any("babbles: a plain paragraph has a perplexity of" in f for f in found.failures)
    assert any("reference finds its answers less likely" in f for f in found.failures)
    assert all(a.surprise is not None and a.surprise > 2 for a in found.answers)


def test_the_reference_is_not_surprised_by_its_own_answers(good: Path) -> None:
    found = check_file(good, _request(), reference=good)
    assert found.passed
    assert all(a.surprise is not None and abs(a.surprise) < 1 for a in found.answers)


def test_a_file_that_says_one_thing_again_and_again_is_caught(tmp_path: Path) -> None:
    path = write_bigram_model(tmp_path / "loop.gguf", always=b"a")
    found = check_file(path, _request())
    assert any("answers are no text: one token" in f for f in found.failures)


def test_a_file_that_does_not_fit_is_caught_and_told_what_would(good: Path) -> None:
    limit = Available(120_000_000, "--memory")
    found = check_file(good, _request(n_ctx=1 << 20, limit=limit))
    assert not found.passed
    assert found.failed_stage == "load"
    assert found.failures[0].startswith("loading it under the limit failed")
    assert found.peak_bytes is None
    assert any(a.startswith("a context of at most") for a in found.advice)
    assert any("--cache-type q8_0" in a for a in found.advice)
    longest = int(found.advice[0].rpartition(" ")[2])
    assert 0 < longest < 1 << 20


def test_the_context_that_is_advised_fits(good: Path) -> None:
    limit = Available(130_000_000, "--memory")
    first = check_file(good, _request(n_ctx=1 << 18, limit=limit))
    longest = int(first.advice[0].rpartition(" ")[2])
    again = check_file(good, _request(n_ctx=min(longest, 4096), limit=limit))
    assert again.passed, again.failures


def test_a_file_that_is_a_little_too_large_is_failed_by_its_peak(good: Path) -> None:
    fits = check_file(good, _request(n_ctx=4096))
    assert fits.peak_bytes is not None
    found = check_file(
        good, _request(n_ctx=4096, limit=Available(fits.peak_bytes - 5_000_000, "x"))
    )
    assert found.failed_stage is None
    assert [f for f in found.failures if f.startswith("its peak of")]
    assert any("--context" in a for a in found.advice)


def test_more_than_the_limit_is_a_failure_even_if_nothing_stopped_it(
    good: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _fake_systemd(tmp_path, monkeypatch, 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"')
    found = check_file(good, _request(limit=Available(20_000_000, "--memory")))
    assert found.limit_method.startswith("cgroup")
    assert found.failed_stage is None
    assert any("above the limit" in f for f in found.failures)


def test_a_process_that_the_kernel_kills_fails_at_its_stage(
    good: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _fake_systemd(tmp_path, monkeypatch, 'case "$*" in *trial*) kill -9 $$;; esac')
    found = check_file(good, _request())
    assert (
        found.failures[0]
        == "loading it under the limit failed: llama.cpp ended with signal SIGKILL"
    )


def test_a_crash_that_is_not_about_memory_brings_no_advice_about_memory(
    good: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _fake_systemd(tmp_path, monkeypatch, 'case "$*" in *trial*) kill -SEGV $$;; esac')
    found = check_file(good, _request())
    assert "signal SIGSEGV" in found.failures[0]
    assert found.advice == ()


def test_a_crash_of_an_allocation_brings_advice_about_memory(
    good: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = "echo 'ggml_aligned_malloc: insufficient memory' >&2; kill -ABRT $$"
    _fake_systemd(tmp_path, monkeypatch, f'case "$*" in *trial*) {said};; esac')
    found = check_file(good, _request())
    assert "insufficient memory" in found.failures[0]
    assert any("--cache-type q8_0" in a for a in found.advice)


def _fake_systemd(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "systemd-run"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_scope_of_systemd_is_preferred_where_it_can_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _fake_systemd(tmp_path, monkeypatch, "exit 0")
    found = limiter(10**9)
    assert "MemoryMax=1000000000" in found.runner
    assert found.rlimit is None
    _fake_systemd(tmp_path, monkeypatch, "exit 1")
    assert limiter(10**9).rlimit == 10**9
    assert limiter(10**9).runner == ()


def test_a_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "no.gguf"
    path.write_text("no")
    with pytest.raises(GGUFError):
        check_file(path, _request())


def _talk(path: Path) -> Asked:
    with Child("ramgguf.llama.trial") as child:
        child.ask(Load(path=str(path), n_ctx=256, n_threads=1), Loaded)
        request = Talk(prompts=("hi",), n_tokens=4, temperature=0.0, seed=1)
        return child.ask(request, Conversation).answers[0]


def test_prompts_are_put_as_the_files_template_has_it(folder: Path) -> None:
    template = (
        "{{ bos_token }}[{{ messages[0]['content'] }}]{% if add_generation_prompt %}>{% endif %}"
    )
    path = write_bigram_model(folder / "template.gguf", template=template)
    assert _talk(path).prompt_ids == (1, *(3 + byte for byte in b"[hi]>"))


def test_all_prompts_are_put_by_one_child_process_each_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Chats] = []

    def by_child(request: Chats) -> RenderedChats:
        requests.append(request)
        return rendered(request)

    monkeypatch.setattr(chat_template, "_by_child", by_child)
    template = "{{ messages | length }}{{ messages[0]['content'] }}"
    path = write_bigram_model(folder / "alone.gguf", template=template)
    model = Deployed(Load(path=str(path), n_ctx=64, n_threads=1))
    put = model.prompts(["hi", "ho"])
    model.close()
    assert [bytes(ids.astype(np.uint8) - 3) for ids in put] == [b"1hi", b"1ho"]
    assert len(requests) == 1


def test_without_a_template_prompts_are_plain_text(good: Path) -> None:
    assert _talk(good).prompt_ids == tuple(3 + byte for byte in b"hi")


def test_a_template_that_fails_is_a_failure_that_says_so(folder: Path) -> None:
    path = write_bigram_model(folder / "broken.gguf", template="{{ nothing.at.all }}")
    found = check_file(path, _request())
    assert found.failed_stage == "talk"
    assert "chat template fails: UndefinedError" in found.failures[0]


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",  # one operation, which no signal of Python's interrupts
        "{{ ('x' * 8000000000) | length }}",
    ],
)
def test_a_template_that_takes_all_is_a_failure_and_holds_nothing_up(
    folder: Path, template: str
) -> None:
    path = write_bigram_model(folder / "hostile.gguf", template=template)
    started = time.monotonic()
    found = check_file(path, _request())
    assert found.failed_stage == "talk"
    assert "chat template fails" in found.failures[0]
    assert time.monotonic() - started < 120


def test_the_score_of_a_text_is_its_negative_log_likelihood(good: Path) -> None:
    with Child("ramgguf.llama.trial") as child:
        child.ask(Load(path=str(good), n_ctx=1024, n_threads=1), Loaded)
        found = child.ask(ScoreText(text=KNOWN_TEXT), Scored)
        tail = child.ask(ScoreText(ids=tuple(3 + b for b in b"th"), first=1), Scored)
    follows = KNOWN_TEXT.count("t")
    share = KNOWN_TEXT.count("th") / follows
    assert tail.n_tokens == 1
    assert tail.nll is not None
    assert perplexity(tail.nll, 1) == pytest.approx(1 / share, rel=0.02)
    assert found.n_tokens == len(KNOWN_TEXT) - 1 - KNOWN_TEXT.count("ab")  # one token
    assert perplexity(None, 3) == float("inf")


def _asked(text: bytes, ids: tuple[int, ...] = (1, 2, 3), *, ended: bool = True) -> Asked:
    return Asked(
        prompt="?", prompt_ids=(1,), ids=ids, text_hex=text.hex(), ended=ended, first_seconds=0.1
    )


def test_signs_of_collapse_are_found_one_by_one() -> None:
    assert signs(_asked(b"Rayleigh scattering.")) == ()
    assert signs(_asked(b"  \n")) == ("empty",)
    assert signs(_asked(b"caf\xc3 no")) == ("invalid UTF-8",)
    loop = signs(_asked(b"ab" * 30, (7, 8, 9) * 20))
    assert loop == ("repetitive: 5% of its sequences of 4 tokens are distinct",)
    assert "one token (id 7)" in signs(_asked(b"aaaa", (7,) * 40))[1]


def test_an_answer_that_was_cut_may_end_within_a_character() -> None:
    cut = "naïveté".encode()[:-1]
    assert signs(_asked(cut, ended=False)) == ()
    assert signs(_asked(cut, ended=True)) == ("invalid UTF-8",)
    assert signs(_asked(b"\xff" + cut, ended=False)) == ("invalid UTF-8",)


def test_short_answers_are_not_called_repetitive() -> None:
    assert distinct_share((1, 1, 1, 1, 1)) is None
    assert distinct_share(tuple(range(40))) == 1.0


def test_a_spread_holds_median_and_ends() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2, low=1, high=3, n=3)


def test_check_prints_a_verdict_and_exits_by_it(good: Path, babbling: Path) -> None:
    options = ["--memory", "500MB", "--context", "128", "--threads", "1", "--repeats", "1"]
    done = CliRunner().invoke(app, ["check", str(good), *options])
    assert done.exit_code == 0, done.output
    for word in ("PASS", "peak", "margin", "time to first token", "load time", "RLIMIT_DATA"):
        assert word in done.output
    done = CliRunner().invoke(app, ["check", str(babbling), *options, "--json"])
    assert done.exit_code == 3
    assert json.loads(done.stdout)["failures"]


def test_two_files_are_compared_by_ratios(good: Path, babbling: Path) -> None:
    options = ["--memory", "500MB", "--context", "128", "--threads", "1", "--repeats", "1"]
    command = ["check", str(good), "--against", str(babbling), *options]
    done = CliRunner().invoke(app, [*command, "--markdown"])
    assert done.exit_code == 0, done.output
    assert "| peak memory |" in done.stdout
    assert done.stdout.count("###") == 2
    assert "PASS" in done.stdout
    assert "FAIL" in done.stdout


def test_ratios_and_markdown_leave_out_what_was_not_measured(passed: CheckResult) -> None:
    bare = passed.model_copy(update={"speed": None, "load_seconds": None})
    assert [r.what for r in ratios(passed, bare)] == ["file", "peak memory"]
    assert all(r.value == 1 for r in ratios(passed, passed))
    assert "tokens/s" not in markdown([bare])


def test_a_child_without_a_model_cannot_be_asked_for_more_context_than_it_has(good: Path) -> None:
    with Child("ramgguf.llama.trial") as child:
        child.ask(Load(path=str(good), n_ctx=256, n_threads=1), Loaded)
        prompt = Talk(prompts=("x" * 300,), n_tokens=4, temperature=0.0, seed=1)
        with pytest.raises(EngineError, match="no room for a prompt"):
            child.ask(prompt, Conversation)
