"""Everything that touches what Ray does not document, and nothing else."""
