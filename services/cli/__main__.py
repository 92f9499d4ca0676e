"""`python -m vcot.services.cli`: the vcot command."""

from vcot.services.cli.start import main

if __name__ == "__main__":
    main()
