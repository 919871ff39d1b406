"""`python -m rewright`."""

from rewright.cli.main import main

main()
