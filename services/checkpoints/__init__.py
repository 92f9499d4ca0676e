"""The checkpoints of a run: registered, named by aliases, and pushed to the hub."""
