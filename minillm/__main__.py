"""`python -m minillm` is the command `minillm`; launchers start modules."""

from minillm.cli import program

program()
