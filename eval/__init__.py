"""Evaluation: scores of single responses, statistics, and the paper's table."""
