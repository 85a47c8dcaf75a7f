"""Write samples into a folder, as seeds for the fuzzers: FOLDER/gguf, FOLDER/documents, ..."""

import sys
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
    names = ("gguf", "documents", "edits", "results", "journals", "imatrix", "hessian")
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
    (folder / "sound").write_bytes(gguf_samples.SOUND.bytes())
    for i, case in enumerate(gguf_samples.hostile_files()):
        if len(case.content) < 4096:
            (folder / f"{i:03}").write_bytes(case.content)


if __name__ == "__main__":
    main()
