"""The nano models, built from scratch: `python -m training.nano --out DIR`."""
