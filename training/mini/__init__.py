"""mini: a real, small language model from the package index, where no hub can be reached."""
