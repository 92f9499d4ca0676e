"""Training jobs as a run submits and follows them."""
