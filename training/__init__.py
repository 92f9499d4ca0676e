"""The TRL worker: the only package that imports torch, transformers, trl and peft. It runs as a process of its own."""
