"""`python -m training.nano`: builds a nano model."""

from training.nano.building import main

if __name__ == "__main__":
    main()
