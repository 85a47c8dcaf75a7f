"""What a model card is made from: a GGUF file, and plans and scores that are of that very file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ramgguf.core.errors import PlanError, ResultError
from ramgguf.core.values import HubFile
from ramgguf.deploy.result import CheckResult
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.result_files import read_material
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.identity import difference
from ramgguf.gguf.reader import GGUFFile, open_gguf, require_language_model
from ramgguf.plan.recipes import Recipe
from ramgguf.plan.result import Plan

# What the hub takes for a license or a repository; anything else is not passed on.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_REPOSITORY = re.compile(r"(?:https?://huggingface\.co/)?([\w.-]+/[\w.-]+?)/?")


@dataclass(frozen=True)
class Origin:
    """What a file's metadata say of what it was made from and by; None where they are silent."""

    version: str | None
    budget: int | None
    plan_sha256: str | None
    data_sha256: str | None
    hub: HubFile | None


@dataclass(frozen=True)
class CardFile:
    """A GGUF model as a card shows it; names are those of its files, without folders.

    largest_bytes is the size of the largest of them; is_embedding: the model pools what it puts out
    and generates nothing. base_models are repositories of the hub; quantized_from_them says that
    the file was made from them, not only something that it was made from.
    """

    names: tuple[str, ...]
    n_bytes: int
    largest_bytes: int
    is_embedding: bool
    header_sha256: str
    sample_sha256: str
    recipe: Recipe
    architecture: str
    name: str | None
    n_context: int | None
    license: str | None
    base_models: tuple[str, ...]
    quantized_from_them: bool
    origin: Origin


@dataclass(frozen=True)
class Card:
    """All that a card may say; every part is about the same file."""

    file: CardFile
    plan: Plan | None = None
    plan_name: str | None = None
    results: tuple[EvalResult, ...] = ()
    check: CheckResult | None = None


def card(
    model: str | Path,
    plan: str | Path | None = None,
    results: Sequence[str | Path] = (),
    check: str | Path | None = None,
) -> Card:
    """Return what a model card of the file may say.

    plan, results (of eval) and check (of check --json) are files. Raises PlanError or ResultError
    when one of them is of another file.
    """
    path = local_path(model)
    with open_gguf(path) as file:  # also of a fork's types: no data are looked at
        require_language_model(file)
        facts = _facts(file)
    followed = None if plan is None else Plan.load(Path(plan))
    if followed is not None:
        _require_followed(facts, followed, Path(plan or ""))
    material = read_material([Path(r) for r in results])
    if material.embeddings:
        raise ResultError("a card shows PPL and KLD; add what `compare --markdown` prints by hand")
    found = material.results
    if results:
        _require_scored(facts, found)
    tried = None if check is None else CheckResult.load(Path(check))
    if tried is not None:
        _require_tried(facts, tried, Path(check or ""))
    return Card(facts, followed, Path(plan).name if plan is not None else None, found, tried)


def _facts(file: GGUFFile) -> CardFile:
    metadata = file.metadata
    said = metadata.string("general.license") or ""
    bases, direct = _base_models(file)
    return CardFile(
        names=tuple(p.name for p in file.paths),
        n_bytes=file.n_bytes,
        largest_bytes=max(path.stat().st_size for path in file.paths),
        is_embedding=bool(metadata.integer(f"{file.architecture}.pooling_type")),
        header_sha256=file.header_sha256,
        sample_sha256=file.sample_sha256,
        recipe=Recipe.of_file(file),
        architecture=file.architecture,
        name=file.name,
        n_context=metadata.integer(f"{file.architecture}.context_length"),
        license=said if _LICENSE.fullmatch(said) else None,
        base_models=bases,
        quantized_from_them=direct,
        origin=Origin(
            version=metadata.string("ramgguf.version"),
            budget=metadata.integer("ramgguf.budget"),
            plan_sha256=metadata.string("ramgguf.plan_sha256"),
            data_sha256=_known(metadata.string("ramgguf.source_sha256")),
            hub=_hub(file),
        ),
    )


def _known(sha256: str | None) -> str | None:
    """Return the hash unless it is the one that stands for none."""
    return sha256 if sha256 and sha256.strip("0") else None


def _hub(file: GGUFFile) -> HubFile | None:
    repo, revision, name = (
        file.metadata.string(f"ramgguf.source_{key}") for key in ("repo", "revision", "file")
    )
    if not (repo and revision) or name is None:
        return None
    return HubFile(repo=repo, revision=revision, file=name)


def _base_models(file: GGUFFile) -> tuple[tuple[str, ...], bool]:
    """Return the repositories that the metadata name, and whether the file was made from them."""
    metadata = file.metadata
    for key in ("ramgguf.source_repo", "general.source.repo_url"):
        found = _REPOSITORY.fullmatch(metadata.string(key) or "")
        if found is not None:
            return (found[1],), True
    n_bases = min(metadata.integer("general.base_model.count") or 0, 16)
    named = [metadata.string(f"general.base_model.{i}.repo_url") or "" for i in range(n_bases)]
    matches = [_REPOSITORY.fullmatch(url) for url in named]
    return tuple(dict.fromkeys(m[1] for m in matches if m is not None)), False


def _require_followed(file: CardFile, plan: Plan, path: Path) -> None:
    """Raise PlanError unless the file has the plan's formats."""
    has = {t.name: t.format for t in file.recipe.tensors}
    planned = {a.name: a.format for a in plan.assignments}
    name, label = next((n for n in planned if has.get(n) != planned[n]), None), file.names[0]
    if name is not None:
        found = has.get(name, "not at all")
        raise PlanError(
            f"{path} gives {name} {planned[name]}, and {label} has it {found}; give the plan that "
            "the file was made by"
        )
    stated = file.origin.plan_sha256
    if len(has) != len(planned) or stated not in (None, plan.sha256()):
        raise PlanError(f"{path} is not the plan that {label} was made by (plan {stated})")


def _require_scored(file: CardFile, results: Sequence[EvalResult]) -> None:
    """Raise ResultError unless one of the results is of the file."""
    if all(difference(r.model, file) is not None for r in results):
        of = ", ".join(dict.fromkeys(r.model.label for r in results)) or "nothing"
        raise ResultError(
            f"the results are of {of}; none is of {file.names[0]} (by its size and hashes)"
        )


def _require_tried(file: CardFile, check: CheckResult, path: Path) -> None:
    """Raise ResultError unless the deployment test was of the file."""
    if check.differs(file) is not None:
        raise ResultError(
            f"{path} is a test of {Path(check.path).name}, {check.n_bytes} bytes; {file.names[0]} "
            f"is another file, of {file.n_bytes} bytes"
        )
