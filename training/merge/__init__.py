"""From an adapter to a checkpoint that vLLM serves, measured before it exists."""
