"""Outputs that other tools logged: read from their files, matched with a benchmark's questions, read by rules, counted."""
