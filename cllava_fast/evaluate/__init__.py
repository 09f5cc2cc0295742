"""Answers, metrics, plots and the report."""
