"""lexmill's own engine for CPUs: no torch, one compiled module (`native/engine`), everything else here."""
