"""A model card: Markdown with YAML front matter, from a file, its plan and its results."""

from collections.abc import Iterator
from pathlib import Path

from ramgguf.core.escape import longest_fence, markdown_code, markdown_text, shell_word, yaml_text
from ramgguf.core.units import format_bytes
from ramgguf.gguf.shards import model_stem
from ramgguf.plan.recipes import RecipeTensor
from ramgguf.plan.result import Plan
from ramgguf.report.card_sources import Card, CardFile
from ramgguf.report.check import markdown as check_markdown
from ramgguf.report.grid import Field, grid_of, to_markdown
from ramgguf.report.memory import context_options, remarks
from ramgguf.report.plans import after_planning, optimality
from ramgguf.report.results import eval_markdown
from ramgguf.report.roles import RoleTensors, largest_first
from ramgguf.report.tensor_types import imatrix_note, recipe_types


def model_card(card: Card) -> str:
    """Return the card; it says nothing that is not in the files, and names are escaped."""
    title = card.file.name or model_stem(Path(card.file.names[0]))
    parts = [
        _front_matter(card.file),
        f"# {markdown_text(title)}, {format_bytes(card.file.n_bytes)} GGUF",
        _what(card.file),
        "## Use",
        _use(card),
        "## Formats",
        _formats(card.file),
        *([_plan(card.plan)] if card.plan else []),
        *_scores(card),
        "## Provenance",
        _provenance(card),
        "## Make it again",
        *_recipe(card),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _front_matter(file: CardFile) -> str:
    lines = ["---"]
    if file.base_models:
        lines += ["base_model:", *(f"- {yaml_text(name)}" for name in file.base_models)]
        lines += ["base_model_relation: quantized"] if file.quantized_from_them else []
    lines += [f"license: {yaml_text(file.license)}"] if file.license else []
    lines += ["tags:", "- gguf", "- ramgguf"] if file.origin.version else ["tags:", "- gguf"]
    return "\n".join([*lines, "---"])


def _what(file: CardFile) -> str:
    n_weights, shards = file.recipe.n_weights, len(file.names)
    kind = "The file" if shards == 1 else f"{shards} shards, the first of them"
    by = f", made by ramgguf {markdown_text(file.origin.version)}" if file.origin.version else ""
    context = f"; context of {file.n_context:,} tokens" if file.n_context else ""
    return (
        f"{kind} {markdown_code(file.names[0])}: {file.n_bytes:,} bytes, {n_weights:,} weights, "
        f"{8 * file.n_bytes / n_weights:.3f} bits of file per weight; architecture "
        f"{markdown_text(file.architecture)}{context}{by}."
    )


def _use(card: Card) -> str:
    name = shell_word(card.file.names[0])
    flags, planned = "", card.plan.memory if card.plan else None
    if card.check is not None and card.check.passed:
        flags = f" {context_options(card.check.n_ctx, 1, card.check.type_k, card.check.type_v)}"
    elif planned is not None:
        shape = planned.n_ctx, planned.n_seq, planned.type_k, planned.type_v
        flags = f" {context_options(*shape)}"
    if card.plan is not None and card.plan.division is not None:
        flags += f" {card.plan.division.options}"
    if card.file.is_embedding:
        commands = _block(f"llama-embedding -m {name}\nllama-server --embedding -m {name}")
    else:
        commands = _block(f"llama-cli -m {name}{flags}\nllama-server -m {name}{flags}")
    if card.plan is None or card.plan.memory is None:
        return commands
    lines = "\n".join(
        f"- {markdown_text(line)}" for line in remarks(card.plan.memory, card.plan.division)
    )
    return f"{commands}\n\n{lines}"


def _block(text: str) -> str:
    fence = "`" * max(3, longest_fence(text) + 1)
    return f"{fence}sh\n{text}\n{fence}"


def _formats(file: CardFile) -> str:
    fields: list[Field[RoleTensors[RecipeTensor]]] = [
        Field("role", lambda r: r.role, number=False),
        Field("formats (tensors)", lambda r: r.formats(", "), number=False),
        Field("bytes", lambda r: format_bytes(r.n_bytes)),
        Field("bpw", lambda r: f"{r.bpw:.2f}"),
    ]
    total = f"All tensors together: {file.recipe.bpw:.3f} bits per weight."
    return f"{to_markdown(grid_of('', fields, largest_first(file.recipe.tensors)))}\n{total}"


def _plan(plan: Plan) -> str:
    said = [
        f"Budget {plan.budget:,} bytes, file {plan.n_bytes:,} bytes; encoder {plan.encoder}.",
        f"{optimality(plan)}.",
    ]
    said += [f"{line}." for line in after_planning(plan)]
    said += [f"{note}." for note in plan.notes]
    return "\n".join(f"- {markdown_text(line)}" for line in said)


def _scores(card: Card) -> Iterator[str]:
    if card.results:
        yield "## Evaluation"
        yield eval_markdown(card.results).removeprefix("### Evaluation\n")
    if card.check is not None:
        yield "## Deployment test"
        named = card.check.model_copy(update={"path": card.file.names[0]})
        yield check_markdown([named]).partition("\n\n")[2]


def _provenance(card: Card) -> str:
    plan, origin = card.plan, card.file.origin
    rows = [("SHA-256 of this file's header", card.file.header_sha256)]
    hub = origin.hub or (plan.source.hub if plan else None)
    if hub is not None:
        rows.append(("source, on the hub", hub.address))
    if plan is not None:
        rows += [
            ("source", f"{Path(plan.source.path).name}, {plan.source.n_bytes:,} bytes"),
            ("SHA-256 of the source's header", plan.source.header_sha256),
        ]
        if plan.imatrix is not None:
            weighed = f"{Path(plan.imatrix.path).name}, SHA-256 {plan.imatrix.sha256}"
            rows.append(("importance matrix", weighed))
            for what, path, sha256 in (
                ("Hessians", plan.imatrix.hessian_path, plan.imatrix.hessian_sha256),
                ("column scales", plan.imatrix.scales_path, plan.imatrix.scales_sha256),
            ):
                if path is not None:
                    rows.append((what, f"{Path(path).name}, SHA-256 {sha256}"))
        if plan.sensitivity_sha256 is not None:
            rows.append(("SHA-256 of the sensitivities", plan.sensitivity_sha256))
    rows += [
        (what, value)
        for what, value in (
            ("SHA-256 of the source's tensor data", origin.data_sha256),
            ("SHA-256 of the plan", origin.plan_sha256),
            ("ramgguf", origin.version),
        )
        if value is not None
    ]
    fields: list[Field[tuple[str, str]]] = [
        Field("what", lambda row: row[0], number=False),
        Field("value", lambda row: row[1], number=False),
    ]
    return to_markdown(grid_of("", fields, rows))


def _recipe(card: Card) -> Iterator[str]:
    """Yield how the file is made again, and how llama-quantize gives its formats to a model."""
    file, plan = card.file, card.plan
    hub = file.origin.hub or (plan.source.hub if plan else None)
    source = hub.address if hub else Path(plan.source.path).name if plan else "SOURCE.gguf"
    source, made = shell_word(source), shell_word(file.names[0])
    whole, split = made, ""
    if len(file.names) > 1:
        whole = shell_word(f"{model_stem(Path(file.names[0]))}.gguf")
        split = f" --split-max-size {file.largest_bytes}"
    if plan is not None and card.plan_name is not None:
        followed = shell_word(card.plan_name)
        yield "From the source and the plan:"
        yield _block(f"ramgguf quantize {source} --plan {followed} -o {whole}{split}")
        if plan.memory is None:
            yield "The plan was made with these options, and the files named above:"
            options = " ".join(map(shell_word, _options(plan)))
            yield _block(f"--budget {plan.budget} {options}")
    types = recipe_types(file.recipe)
    yield "The same formats by llama.cpp's own encoders:"
    yield _block(
        f"ramgguf recipe {made} --export-tensor-types types.txt\n"
        f"llama-quantize --tensor-type-file types.txt {'SOURCE.gguf' if hub else source} "
        "OUT.gguf Q8_0"
    )
    if note := imatrix_note(types):
        yield f"{markdown_text(note)}."


def _options(plan: Plan) -> list[str]:
    limits = plan.constraints
    options = ["--encoder", plan.encoder, "--objective", plan.objective]
    options += ["--min-sqnr", f"{limits.min_sqnr_db:g}"]
    if limits.formats is not None:
        options += ["--formats", ",".join(limits.formats)]
    for pin in limits.pins:
        options += ["--pin", f"{pin.pattern}={pin.format}"]
    for tie in limits.ties:
        options += ["--tie", ",".join(tie)]
    for least in limits.min_formats:
        options += ["--min-format", f"{least.role}={least.format}"]
    return options
