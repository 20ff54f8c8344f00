"""`python -m search`: the `slimfront` command, wherever it is installed."""

from search.cli import main

main()
