"""`python -m slimfront`: the `slimfront` command, wherever it is installed."""

from slimfront.search.cli import main

main()
