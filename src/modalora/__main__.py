"""`python -m modalora` is the command `modalora`."""

from modalora.cli.main import main

main()
