"""`python -m lexmill`: the command line."""

from lexmill.cli.main import main

main()
