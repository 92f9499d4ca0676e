"""`python -m services.cli`: the vcot command."""

from services.cli.start import main

if __name__ == "__main__":
    main()
