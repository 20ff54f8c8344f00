"""Submit, status, logs and stop, over Ray Jobs."""
