"""Write samples into a folder, as seeds for the fuzzers: FOLDER/gguf, FOLDER/documents, ..."""

import struct
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import gguf_samples
import imatrix_samples
import made_documents
import made_results
from ramgguf.quants.hessian import gram_name, new_hessians


def main() -> None:
    """Write one file for each sample."""
    names = (
        "gguf", "documents", "edits", "results", "journals", "imatrix", "hessian",
        "headers-used", "hessian-encode", "imatrix-encode", "results-compared",
    )  # fmt: skip
    folders = {name: Path(sys.argv[1]) / name for name in names}
    for made in folders.values():
        made.mkdir(parents=True, exist_ok=True)
    folder, results, imatrices = (folders[n] for n in ("gguf", "results", "imatrix"))
    for i, document in enumerate(made_documents.documents()):
        (folders["documents"] / document.KIND).write_text(document.to_json())
        (folders["edits"] / document.KIND).write_bytes(bytes((i, 3, 200, 1, 2, 3, 4, 5)))
    for i, (kind, lines) in enumerate(made_documents.journals().items()):
        (folders["journals"] / kind).write_bytes(bytes((i, 2, 1, 0, 9, 2, 0, 5)))
        (results / f"{kind}.journal").write_text("\n".join(lines) + "\n")
    result = made_documents.result()
    result.save(results / "result")
    (results / "journal").unlink(missing_ok=True)
    made_results.journal(results / "journal", result)
    (results / "csv").write_text("model,n_bytes,mean_ppl\na,1000,8.5\nb,2000,7.5\n")
    (imatrices / "dat").write_bytes(imatrix_samples.sound_legacy())
    imatrix_samples.write_gguf(imatrices / "gguf", imatrix_samples.sound_tensors())
    gram = folders["hessian"] / "gguf"
    with new_hessians(gram, {"a": "a", "b": "a"}, {"a": 4}, 10, force=True) as file:
        file.write(gram_name("a"), np.eye(4, dtype=np.float32))
        file.commit()
    _write_used(folders)
    (folder / "sound").write_bytes(gguf_samples.SOUND.bytes())
    for i, case in enumerate(gguf_samples.hostile_files()):
        if len(case.content) < 4096:
            (folder / f"{i:03}").write_bytes(case.content)


def _write_used(folders: Mapping[str, Path]) -> None:
    """Write what is used after it is opened: of shapes that whole blocks fit."""
    file = gguf_samples.quantizable()
    (folders["headers-used"] / "sound").write_bytes(file.bytes())
    (folders["headers-used"] / "edits").write_bytes(bytes((0, 200, 65, 1, 9, 27, 3, 0, 255)))
    for n in (32, 256):
        matrices = folders["imatrix-encode"]
        shares = np.linspace(0, 4, n, dtype=np.float32)
        entry = imatrix_samples.legacy_entry("a", 2, shares)
        (matrices / f"dat{n}").write_bytes(imatrix_samples.legacy(entry))
        named = {"a.in_sum2": shares[None], "a.counts": np.full((1, 1), 2, np.float32)}
        imatrix_samples.write_gguf(matrices / f"gguf{n}", named)
    inputs = np.random.default_rng(0).standard_normal((64, 32), dtype=np.float32)
    inputs[:, 1] = inputs[:, 0]
    gram = folders["hessian-encode"] / "gguf"
    with new_hessians(gram, {"a": "a", "b": "a"}, {"a": 32}, 64, force=True) as out:
        out.write(gram_name("a"), inputs.T @ inputs)
        out.commit()
    edits = ((0, 0, 1e30), (3, 4, -5.0), (5, 5, 0.0), (6, 6, 1e-30))
    written = b"".join(struct.pack("<BBf", *edit) for edit in edits)
    (folders["hessian-encode"] / "edits").write_bytes(written)
    boards = folders["results-compared"]
    (boards / "csv").write_text("model,n_bytes,mean_ppl,mean_kld\na,1000,8.5,0.1\nb,2000,7.5,0\n")
    for i in range(3):
        (boards / f"edits{i}").write_bytes(bytes((i, 1, 40 * i, 3, 7, 2, 90, 5, 11, 0, 200, 9)))


if __name__ == "__main__":
    main()
