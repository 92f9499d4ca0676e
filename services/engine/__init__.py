"""The vLLM process: how it is started, watched over, and ended."""
