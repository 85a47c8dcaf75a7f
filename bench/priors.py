"""Where sensitivities lie, by role and depth, in two families; and which priors plan best.

    python bench/priors.py text mix.txt
    python bench/priors.py alpha models/smol768-f16.gguf --text mix.txt --n-seq 4 --folder scratch
    python bench/priors.py text short.txt --share 0.5
    python bench/priors.py alpha models/qwen05-f16.gguf --text short.txt --n-seq 2 \\
        --context 192 --folder scratch
    python bench/priors.py finish models/qwen05-f16.gguf --folder scratch
    python bench/priors.py rows scratch/smol768.sens.json scratch/qwen05.sens.json
    python bench/priors.py files models/qwen05-f16.gguf before.plan.json after.plan.json \\
        --folder scratch

finish ends a run before all tensors are read: others are imputed. rows keeps a line for every
tensor in bench/results/priors.jsonl; bench/cross_validation.py draws the conclusions. files writes
what two versions of ramgguf plan, and adds the ratio of their KLD on the mix's part for scores,
with its 95 % interval by paired bootstrap over windows.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np

import ramgguf
from paired import kld_ratio
from provenance import provenance
from ramgguf.cluster.runners import opened
from ramgguf.core.corpus import text_file
from ramgguf.core.mix import Document, by_domain
from ramgguf.core.progress import Silent
from ramgguf.core.version import __version__
from ramgguf.evaluate.held_out import score_held_out
from ramgguf.gguf.architecture import layer_of, role_of
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.forward import ForwardRequest, ForwardResult, ForwardRunner
from ramgguf.llama.system import system_info
from ramgguf.llama.tokens import TokenRequest
from ramgguf.plan.result import Plan
from ramgguf.sensitivity.alpha import is_probed, measure_alpha
from ramgguf.sensitivity.impute import Member, impute
from ramgguf.sensitivity.journal import Journal
from ramgguf.sensitivity.result import Sensitivity

# Characters of the mix's calibration part that make about as many tokens of each domain.
CHARACTERS = {"prose": 690, "code": 600, "mathematics": 560, "chat": 690, "languages": 500}
N_THREADS = 2
ROUNDS = 2  # windows of each domain
FIRST = 8  # tokens of a sequence that scores leave out
OUT = Path(__file__).parent / "results" / "priors.jsonl"


def words(document: Document) -> str:
    return document.text or "\n\n".join(f"{t.role}: {t.content}" for t in document.turns)


def probe_text(share: float) -> str:
    """Return a short text of all domains of the mix's calibration part."""
    found = []
    for domain, documents in by_domain("calibrate").items():
        some = documents[1::2] if domain == "languages" else documents[len(documents) // 2 :][:1]
        found += [words(d)[: int(share * CHARACTERS[domain]) // len(some)] for d in some]
    return "\n\n".join(found) + "\n"


class Recorder:
    """Passes that also keep each token's KLD, a line for each tensor."""

    def __init__(self, passes: ForwardRunner, path: Path) -> None:
        self._passes, self._path = passes, path

    def __getattr__(self, name: str) -> object:
        return getattr(self._passes, name)

    def run(self, wanted: Sequence[ForwardRequest]) -> Iterator[tuple[int, ForwardResult]]:
        for position, found in self._passes.run(wanted):
            if wanted[position].changes:
                with self._path.open("a") as out:
                    kld = [float(f"{k:.4g}") for k in found.kld]
                    out.write(json.dumps({"name": wanted[position].changes[0][0], "kld": kld}))
                    out.write("\n")
            yield position, found


def measure(source: Path, text: Path, folder: Path, n_sequences: int, n_ctx: int) -> None:
    """Measure every α of the model; after a kill, go on."""
    stem = folder / source.stem.removesuffix("-f16")
    request = TokenRequest(
        encoder="search",
        tokens="text",
        corpus=text_file(text),
        n_sequences=n_sequences,
        n_ctx=n_ctx,
    )
    journal = stem.with_suffix(".partial")

    @contextlib.contextmanager
    def recorded(
        opening: contextlib.AbstractContextManager[ForwardRunner],
    ) -> Iterator[ForwardRunner]:
        with opening as passes:
            yield cast(ForwardRunner, Recorder(passes, stem.with_suffix(".kld.ndjson")))

    with opened(
        source, request, folder=folder, journal=journal, threads=N_THREADS, executor=None
    ) as at:
        found = measure_alpha(
            at.file,
            request,
            recorded(at.opening),
            journal_path=at.journal,
            progress=Silent(),
            announce=print,
        )
    found.save(stem.with_suffix(".sens.json"))


def finish(source: Path, folder: Path) -> None:
    """Write the sensitivity of the tensors that are read so far; others are imputed."""
    stem = folder / source.stem.removesuffix("-f16")
    with Journal(stem.with_suffix(".partial")) as journal, open_gguf(source) as file:
        settings, readings = journal.settings, dict(journal.readings)
        assert settings is not None
        members = [
            Member(
                t.name,
                role_of(t.name, file.architecture, tied=file.has_tied_embedding),
                layer_of(t.name),
                t.n_weights,
            )
            for t in file.tensors
            if is_probed(file, t)
        ]
    Sensitivity(
        ramgguf_version=__version__,
        source=settings.source,
        encoder="search",
        engine=system_info().build,
        tokens=settings.tokens,
        tensors=impute(members, readings),
        notes=(f"{len(readings)} of {len(members)} tensors were read",),
    ).save(stem.with_suffix(".sens.json"))


def with_late(path: Path) -> None:
    """Add to a sensitivity's readings the KLD without first tokens, from the record of all."""
    found = Sensitivity.load(path)
    shares = late(
        path.with_name(f"{path.name.split('.')[0]}.kld.ndjson"),
        found.tokens.n_tokens // found.tokens.n_sequences,
    )
    tensors = tuple(
        t
        if t.reading is None
        else t.model_copy(
            update={
                "reading": t.reading.model_copy(update={"late_kld": t.reading.kld * shares[t.name]})
            }
        )
        for t in found.tensors
    )
    found.model_copy(update={"tensors": tensors}).save(path)


def late(path: Path, n_ctx: int) -> dict[str, float]:
    """Return each tensor's KLD without the first tokens of each sequence, of the KLD with them."""
    found = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        kld = np.array(row["kld"]).reshape(-1, n_ctx)
        found[row["name"]] = float(kld[:, FIRST:].mean() / kld.mean())
    return found


def add_rows(sensitivities: list[Path]) -> None:
    """Write a line for every model and tensor."""
    with OUT.open("w") as out:
        for path in sensitivities:
            found = Sensitivity.load(path)
            model = path.name.split(".")[0]
            n_ctx = found.tokens.n_tokens // found.tokens.n_sequences
            later = late(path.with_name(f"{model}.kld.ndjson"), n_ctx)
            head = {
                "bench": "priors",
                "part": "model",
                "model": model,
                "architecture": found.source.architecture,
                "tokens": f"{found.tokens.n_sequences} × {n_ctx}",
                "encoder": found.encoder,
                "engine": found.engine,
                **provenance(),
            }
            out.write(json.dumps(head) + "\n")
            for t in found.tensors:
                row = {
                    "bench": "priors",
                    "part": "alpha",
                    "model": model,
                    "name": t.name,
                    "role": t.role,
                    "layer": t.layer,
                    "n_weights": t.n_weights,
                    "alpha_per_weight": float(f"{t.alpha / t.n_weights:.4g}"),
                    "relative_error": round(t.relative_error, 3),
                    "origin": t.origin,
                    "late": round(later[t.name], 3) if t.name in later else None,
                }
                out.write(json.dumps(row) + "\n")


def compare_files(source: Path, plans: list[Path], folder: Path) -> None:
    """Add the KLD of the files of two plans, and the second's as a share of the first's."""
    paths, made = [], [Plan.load(path) for path in plans]
    for i, plan in enumerate(made):
        paths.append(folder / f"{source.stem}.{i}.gguf")
        ramgguf.quantize(source, from_plan=plan, output=paths[-1], force=True, verify=False)
    scores = score_held_out(
        paths, source, max_rounds=ROUNDS, seconds=None, threads=N_THREADS,
        reference_logits=folder / f"{source.stem.removesuffix('-f16')}.logits",
    )  # fmt: skip
    for path in paths:
        path.unlink()
    base, other = ([w.kld_sum for w in score.windows] for score in scores[:2])
    value, low, high = kld_ratio(other, base, [w.domain for w in scores[0].windows])
    row = {
        "bench": "priors",
        "part": "files",
        "model": source.stem.removesuffix("-f16"),
        "plans": [path.name for path in plans],
        "n_bytes": [plan.n_bytes for plan in made],
        "bpw": round(made[1].bpw, 3),
        "kld": [score.overall().kld.value for score in scores],
        "ratio": round(value, 4),
        "ratio_low": round(low, 4),
        "ratio_high": round(high, 4),
        "n_windows": len(scores[0].windows),
        **provenance(),
    }
    print(json.dumps(row), flush=True)
    with OUT.open("a") as out:
        out.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["text", "alpha", "late", "finish", "rows", "files"])
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--n-seq", type=int, default=3)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--share", type=float, default=1.0)
    arguments = parser.parse_args()
    if arguments.part == "text":
        arguments.files[0].write_text(probe_text(arguments.share), encoding="utf-8")
    elif arguments.part == "alpha":
        measure(
            arguments.files[0],
            arguments.text,
            arguments.folder,
            arguments.n_seq,
            arguments.context,
        )
    elif arguments.part == "late":
        with_late(arguments.files[0])
    elif arguments.part == "finish":
        finish(arguments.files[0], arguments.folder)
    elif arguments.part == "files":
        compare_files(arguments.files[0], arguments.files[1:], arguments.folder)
    elif arguments.part == "rows":
        add_rows(arguments.files)


if __name__ == "__main__":
    main()
