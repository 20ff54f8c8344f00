"""What is known of a search: journal, ledger, storage, session, Pareto mathematics, picks and
report."""
