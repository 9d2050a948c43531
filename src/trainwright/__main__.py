"""`python -m trainwright` is the command line, so that launchers such as torchrun can start it."""

from trainwright.cli.main import main

if __name__ == "__main__":
    main()
