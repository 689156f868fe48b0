"""`python -m minillm` is the command `minillm`; launchers start modules."""

from minillm.cli.main import program

program()
