"""MLflow: the recorder of a search, its figures, and the UI."""
