"""Where compiled modules are looked for: in the sources, and where an editable install puts what it builds."""

import lexmill
from lexmill.devices import compiled_module


def test_modules_are_found_in_every_folder_of_the_package(tmp_path, monkeypatch):
    built, sources = tmp_path / "built", tmp_path / "sources"
    for folder in (built, sources):
        folder.mkdir()
    monkeypatch.setattr(lexmill, "__path__", [str(built), str(sources)])
    monkeypatch.setattr("sys.platform", "linux")
    assert compiled_module("_engine") is None
    (sources / "_engine.so").touch()
    assert compiled_module("_engine") == sources / "_engine.so"
    (built / "_engine.so").touch()
    assert compiled_module("_engine") == built / "_engine.so"
