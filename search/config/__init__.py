"""What a search is: its schema, settings, space, objectives and samplers, YAML and `--set`."""
