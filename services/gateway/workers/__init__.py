"""Several processes that carry requests for one that decides where they go."""
