"""Write samples into a folder, as seeds for the fuzzers: FOLDER/gguf, FOLDER/documents, ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import gguf_samples
import ramgguf
import synthetic
import test_hostile_documents
import test_imatrix
import test_result_files


def main() -> None:
    """Write one file for each sample."""
    names = ("gguf", "documents", "results", "imatrix")
    folder, documents, results, imatrices = (Path(sys.argv[1]) / name for name in names)
    for made in (folder, documents, results, imatrices):
        made.mkdir(parents=True, exist_ok=True)
    measurement = synthetic.measurement(n_layers=1)
    small = measurement.model_copy(update={"tensors": measurement.tensors[:2]})
    sensitivity = test_hostile_documents.sensitivity()
    for document in (small, ramgguf.plan(small, 10**6, min_sqnr_db=0), sensitivity):
        document.save(documents / document.KIND)
    result = test_hostile_documents.result()
    result.save(results / "result")
    (results / "journal").unlink(missing_ok=True)
    test_result_files.journal(results / "journal", result)
    (results / "csv").write_text("model,n_bytes,mean_ppl\na,1000,8.5\nb,2000,7.5\n")
    (imatrices / "dat").write_bytes(test_imatrix.sound_legacy())
    test_imatrix.write_gguf(imatrices / "gguf", test_imatrix.sound_tensors())
    (folder / "sound").write_bytes(gguf_samples.SOUND.bytes())
    for i, case in enumerate(gguf_samples.hostile_files()):
        if len(case.content) < 4096:
            (folder / f"{i:03}").write_bytes(case.content)


if __name__ == "__main__":
    main()
