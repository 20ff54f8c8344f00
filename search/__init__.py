"""Proposes, schedules and records candidates: the only place that knows Optuna and MLflow."""
