"""The command line: one file a verb, each a thin shell over the Python API."""
