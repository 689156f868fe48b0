"""`python -m minillm` is the command `minillm`; launchers start modules."""

import sys

from minillm.cli import main

sys.exit(main())
