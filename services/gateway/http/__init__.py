"""What a request meets: connection, keys, limits, content, and the way to an engine and back."""
