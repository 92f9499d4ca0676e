"""`python -m vcot.training.nano`: builds a nano model."""

from vcot.training.nano.building import main

if __name__ == "__main__":
    main()
