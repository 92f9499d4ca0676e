"""How other weights come to be served, verified, or not at all."""
