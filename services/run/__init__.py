"""The loop over a run directory: its steps, its rounds, its gates, and what is reported of it."""
