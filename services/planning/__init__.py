"""What a machine can run and what a run will take, told before anything is begun."""
