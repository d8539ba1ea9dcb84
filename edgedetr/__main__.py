"""`python -m edgedetr`: the command line where its script is not on the path."""

from edgedetr.cli.app import main

main()
