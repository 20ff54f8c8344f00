"""Trains, compacts and measures one candidate network, with torch alone: no Ray, Optuna or
MLflow."""
