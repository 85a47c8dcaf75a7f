"""Model cards: they say what the files say, of the right file, and nothing breaks out of them."""

import importlib
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from typer.testing import CliRunner

import made_results
import ramgguf
from gguf_samples import finish_gguf
from ramgguf.cli.app import app
from ramgguf.core.errors import GGUFError, PlanError, ResultError
from ramgguf.core.units import format_bytes
from ramgguf.core.version import __version__
from ramgguf.deploy.result import CheckResult
from ramgguf.evaluate.result import EvalResult
from ramgguf.gguf.reader import open_gguf
from ramgguf.plan.result import Division, MemoryBudget, MemoryUse, Plan
from ramgguf.quants.imatrix import ImportanceSource
from ramgguf.report.card import model_card
from ramgguf.report.card_sources import card

NASTY = "a|b `c` <script> [x](y) *z* #1\n# not a heading\n---\n$m$ &amp; {{x}}"


def _write(path: Path, name: str = "Tiny", **strings: str) -> Path:
    """Write a model of three tensors whose metadata hold these strings."""
    rng, out = np.random.default_rng(0), GGUFWriter(path, "llama")
    out.add_name(name)
    out.add_context_length(2048)
    for key, value in strings.items():
        out.add_string(key.replace("__", "."), value)
    if "general__base_model__0__repo_url" in strings:
        out.add_uint32("general.base_model.count", 1)
    out.add_tensor("token_embd.weight", rng.standard_normal((64, 256)).astype(np.float16))
    out.add_tensor("blk.0.ffn_up.weight", rng.standard_normal((64, 256)).astype(np.float16))
    out.add_tensor("output_norm.weight", rng.standard_normal(256).astype(np.float32))
    finish_gguf(out)
    return path


@dataclass(frozen=True)
class Made:
    """A quantized model with everything that a card takes, as files in a folder."""

    folder: Path
    path: Path
    plan: Plan
    result: EvalResult
    check: CheckResult


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("card")
    source = _write(folder / "tiny-f16.gguf", general__license="apache-2.0")
    pins = ["blk.0.ffn_up=Q6_K"]
    done = ramgguf.quantize(
        source, "7bpw", folder / "tiny.gguf", pins=pins, min_sqnr_db=12, effort="fast"
    )
    done.plan.save(folder / "plan.json")
    with open_gguf(done.paths[0]) as file:
        header = file.header_sha256
    ppl, kld = np.linspace(8, 11, 12), np.linspace(0.1, 0.2, 12)
    result = made_results.eval_result("tiny", ppl, reference=("tiny-f16", ppl - 0.1), kld=kld)
    update = {"header_sha256": header, "n_bytes": done.n_bytes}
    result = result.model_copy(update={"model": result.model.model_copy(update=update)})
    result.save(folder / "scores.json")
    check = CheckResult(
        ramgguf_version="0.1.0", path="/somewhere/secret/tiny.gguf", n_bytes=done.n_bytes,
        header_sha256=header, name="Tiny", n_ctx=1024, type_k="F16", type_v="F16", n_threads=1,
        limit=10**9, limit_source="--memory", limit_method="rlimit",
        planned=MemoryUse(weights=1, cache=2, compute=3, overhead=4), planned_by="llama.cpp",
        peak_bytes=3 * 10**8, known_ppl=12.5,
    )  # fmt: skip
    check.save(folder / "check.json")
    return Made(folder, done.paths[0], done.plan, result, check)


def _front_matter(text: str) -> dict[str, Any]:
    """Return what a YAML reader finds between the first two lines of dashes."""
    assert text.startswith("---\n")
    found: dict[str, Any] = importlib.import_module("yaml").safe_load(text.split("\n---\n")[0])
    return found


def test_a_card_of_all_papers_says_what_they_say(made: Made) -> None:
    f = made.folder
    text = model_card(card(made.path, f / "plan.json", [f / "scores.json"], f / "check.json"))
    plan = made.plan
    assert _front_matter(text) == {"license": "apache-2.0", "tags": ["gguf", "ramgguf"]}
    assert f"# Tiny, {format_bytes(made.path.stat().st_size)} GGUF" in text
    assert f"{made.path.stat().st_size:,} bytes" in text
    assert "| ffn\\_up | Q6\\_K ×1 |" in text
    assert "predicted" not in text
    assert "| tiny |" in text
    assert "Protocol ram: 12 windows of 2048 tokens" in text
    assert re.search(r"\| 0\.150 \(0\.\d+–0\.\d+\) \|", text)  # mean KLD and its interval
    assert "PASS: tiny.gguf runs in 1.00 GB" in text
    for hash_ in (plan.source.header_sha256, plan.sha256(), made.check.header_sha256):
        assert f"| {hash_} |" in text
    assert f"| ramgguf | {__version__} |" in text
    assert "quantized_by" not in text
    assert "secret" not in text
    assert str(f) not in text


def test_the_commands_of_a_card_make_the_same_file(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = model_card(card(made.path, made.folder / "plan.json"))
    blocks = re.findall(r"^```sh\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    follow = next(b for b in blocks if b.startswith("ramgguf quantize"))
    options = next(b for b in blocks if b.startswith("--budget"))
    for name in ("tiny-f16.gguf", "plan.json"):
        (tmp_path / name).write_bytes((made.folder / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    commands = [
        shlex.split(follow)[1:],
        ["quantize", "tiny-f16.gguf", "-o", "again.gguf", *shlex.split(options)],
        *(shlex.split(line)[1:] for b in blocks for line in b.splitlines() if " recipe " in line),
    ]
    assert len(commands) == 3
    for command in commands:
        assert CliRunner().invoke(app, command).exit_code == 0, command
    before = made.path.read_bytes()
    assert (tmp_path / "tiny.gguf").read_bytes() == before
    assert (tmp_path / "again.gguf").read_bytes() == before
    assert (tmp_path / "types.txt").read_text().count("\n") == 2


def test_the_commands_have_the_options_that_the_file_was_tried_or_planned_with(made: Made) -> None:
    f = made.folder
    check = made.check.model_copy(update={"type_k": "Q8_0", "type_v": "Q8_0"})
    check.save(f / "q8.json")
    text = model_card(card(made.path, f / "plan.json", check=f / "q8.json"))
    assert "llama-cli -m tiny.gguf -c 1024 -ctk q8_0 -ctv q8_0\n" in text
    facts = card(made.path, f / "plan.json")
    memory = MemoryBudget(
        limit=10**9, limit_source="--memory", n_ctx=512, n_seq=2, type_k="F16", type_v="F16",
        method="llama.cpp", ram=MemoryUse(weights=1, cache=2, compute=3, overhead=4),
    )  # fmt: skip
    update = {"memory": memory, "division": Division(n_gpu_layers=3)}
    planned = replace(facts, plan=made.plan.model_copy(update=update))
    text = model_card(planned)
    assert "llama-cli -m tiny.gguf -c 1024 -np 2 -ngl 3\n" in text
    assert "--budget" not in text  # which alone makes another plan
    pooled = replace(facts, file=replace(facts.file, is_embedding=True))
    assert "llama-embedding -m tiny.gguf\n" in model_card(pooled)


def test_the_command_of_a_split_file_makes_shards_again(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny-f16.gguf", "plan.json"):
        (tmp_path / name).write_bytes((made.folder / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    first = ramgguf.quantize(
        tmp_path / "tiny-f16.gguf", output=tmp_path / "s.gguf", from_plan=made.plan,
        split_max_bytes=16_000,
    )  # fmt: skip
    assert len(first.paths) > 1
    before = {path.name: path.read_bytes() for path in first.paths}
    text = model_card(card(first.paths[0], tmp_path / "plan.json"))
    (command,) = re.findall(r"^ramgguf (quantize .* --plan .*)$", text, re.MULTILINE)
    for path in first.paths:
        path.unlink()
    assert CliRunner().invoke(app, shlex.split(command)).exit_code == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("s-*")} == before
    with pytest.raises(GGUFError, match=r"is the name of a shard.* name the whole, s\.gguf"):
        ramgguf.quantize(
            tmp_path / "tiny-f16.gguf", output=first.paths[0], from_plan=made.plan, force=True
        )


def test_a_card_names_hessians_and_scales(made: Made) -> None:
    facts = card(made.path, made.folder / "plan.json")
    weighed = ImportanceSource(
        path="/a/i.gguf", sha256="1" * 64, n_entries=1, hessian_path="/a/h.gguf",
        hessian_sha256="2" * 64, scales_path="/a/s.gguf", scales_sha256="3" * 64,
    )  # fmt: skip
    text = model_card(replace(facts, plan=made.plan.model_copy(update={"imatrix": weighed})))
    for what, name, digit in (
        ("importance matrix", "i", "1"), ("Hessians", "h", "2"), ("column scales", "s", "3"),
    ):  # fmt: skip
        assert f"| {what} | {name}.gguf, SHA-256 {digit * 64} |" in text


def test_a_card_of_the_file_alone_claims_less(made: Made) -> None:
    text = model_card(card(made.path))
    for absent in ("## Evaluation", "## Deployment test", "predicted", "--plan", "Budget"):
        assert absent not in text
    assert made.plan.sha256() in text  # the file itself says it
    plain = model_card(card(made.folder / "tiny-f16.gguf"))
    assert _front_matter(plain) == {"license": "apache-2.0", "tags": ["gguf"]}
    assert "ramgguf |" not in plain


def test_names_cannot_break_out_of_the_card(tmp_path: Path) -> None:
    name = "we`ird $(rm) ```x|y.gguf"
    keys = {"general__license": "mit\nowner: me", "general__source__repo_url": 'x/y"\nz: 1'}
    text = model_card(card(_write(tmp_path / name, NASTY, **keys)))
    assert _front_matter(text) == {"tags": ["gguf"]}
    body = text.split("\n---\n", 1)[1]
    (heading,) = (line for line in body.splitlines() if line.startswith("# "))
    escaped = (
        r"# a\|b \`c\` \<script\> \[x\](y) \*z\* \#1 \# not a heading --- \$m\$ \&amp; \{\{x\}\}"
    )
    assert heading == f"{escaped}, {format_bytes((tmp_path / name).stat().st_size)} GGUF"
    assert "---" not in body.splitlines()
    fences = [line for line in body.splitlines() if line.startswith("````")]
    assert fences[::2] == ["````sh"] * (len(fences) // 2)
    assert f"llama-cli -m {shlex.quote(name)}" in body


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"ramgguf__source_repo": "acme/tiny"}, {"base_model_relation": "quantized"}),
        (
            {"general__source__repo_url": "https://huggingface.co/acme/tiny"},
            {"base_model_relation": "quantized"},
        ),
        ({"general__base_model__0__repo_url": "https://huggingface.co/acme/tiny"}, {}),
    ],
)
def test_the_base_model_is_what_the_metadata_name(
    keys: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    text = model_card(card(_write(tmp_path / "m.gguf", **keys)))
    assert _front_matter(text) == {"base_model": ["acme/tiny"], "tags": ["gguf"], **expected}


def test_base_models_elsewhere_are_not_the_hub_s(tmp_path: Path) -> None:
    url = "https://example.org/acme/tiny"
    text = model_card(card(_write(tmp_path / "m.gguf", general__source__repo_url=url)))
    assert "base_model" not in text


def test_papers_of_another_file_are_refused(made: Made, tmp_path: Path) -> None:
    f, source = made.folder, made.folder / "tiny-f16.gguf"
    with pytest.raises(PlanError, match=r"plan\.json gives .*, and tiny-f16\.gguf has it F16"):
        card(source, f / "plan.json")
    with pytest.raises(ResultError, match="results are of tiny; none is of tiny-f16"):
        card(source, results=[f / "scores.json"])
    with pytest.raises(ResultError, match=r"check\.json is a test of tiny\.gguf"):
        card(source, check=f / "check.json")
    other = made.plan.model_copy(update={"encoder": "rtn"})
    other.save(tmp_path / "rtn.json")
    with pytest.raises(PlanError, match=r"rtn\.json is not the plan that tiny\.gguf was made by"):
        card(made.path, tmp_path / "rtn.json")


def test_the_command_writes_the_card_once(made: Made, tmp_path: Path) -> None:
    output = tmp_path / "README.md"
    command = ["card", str(made.path), "--plan", str(made.folder / "plan.json")]
    assert CliRunner().invoke(app, [*command, "-o", str(output)]).exit_code == 0
    assert output.read_text() == CliRunner().invoke(app, command).stdout
    again = CliRunner().invoke(app, [*command, "-o", str(output)])
    assert isinstance(again.exception, PlanError)
    assert "--force" in str(again.exception)
