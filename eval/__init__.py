"""Benchmarks and statistics: prompts, parsers, intervals and the paper's table."""
