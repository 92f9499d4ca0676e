"""The vcot command: its names and help, what each command does, and what a person sees of it."""
