"""`lexmill imatrix` and `export gguf` with mixes, as a user's commands."""

from conftest import lexmill

from lexmill.formats.gguf import GGUFFile
from lexmill.formats.imatrix import read_imatrix


def test_from_text_to_a_quantised_file(tmp_path, model_path, prose):
    (tmp_path / "text.txt").write_text(prose[:4000], "utf-8")
    asked = ["imatrix", model_path, "--data", tmp_path / "text.txt", "--chunk-size", "64", "--chunks", "4"]
    for name in ("m.gguf", "m.dat"):
        done = lexmill(*asked, "--out", tmp_path / name)
        assert done.returncode == 0 and "14 matrices, 4 chunks of 64 tokens" in done.stdout, done.stderr
        assert read_imatrix(tmp_path / name).datasets == ("text.txt",)
        out = tmp_path / f"{name}-model.gguf"
        done = lexmill(
            "export", "gguf", model_path, "--type", "Q4_K_M", "--imatrix", tmp_path / name, "--out", out
        )
        assert done.returncode == 0 and "Q4_K becomes Q5_0 in" in done.stderr, done.stderr
        with GGUFFile.open(out) as file:
            assert file.metadata["general.file_type"] == 15
            assert file.metadata["quantize.imatrix.file"] == name


def test_what_a_user_can_mend(tmp_path, model_path):
    (tmp_path / "short.txt").write_text("Too short.", "utf-8")
    (tmp_path / "m.dat").write_bytes(b"\x05\0\0\0 nothing of the kind")
    out = tmp_path / "out"
    for arguments, message in [
        (("imatrix", model_path, "--data", tmp_path / "short.txt", "--out", out), "too few for a chunk"),
        (("imatrix", model_path, "--data", tmp_path / "none.txt", "--out", out), "none.txt"),
        (("export", "gguf", model_path, "--type", "q4_k_x", "--out", out), "q4_k_s"),
        (("export", "gguf", model_path, "--imatrix", tmp_path / "m.dat", "--out", out), "m.dat"),
    ]:
        done = lexmill(*arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not out.exists()
