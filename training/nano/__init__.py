"""The nano models, built from scratch: `python -m vcot.training.nano --out DIR`."""
