"""`python -m dynamask`."""

from dynamask.cli.main import main

main()
