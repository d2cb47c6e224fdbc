"""`python -m dynamask`."""

from dynamask.cli import main

main()
