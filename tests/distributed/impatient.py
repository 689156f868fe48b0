"""`minillm train` that takes a silent rank for lost sooner: SECONDS ARGUMENTS..."""

import sys

from minillm.cli import main as cli
from minillm.distributed import heartbeat

if __name__ == "__main__":
    heartbeat.SILENT_SECONDS = float(sys.argv[1])
    heartbeat.GRACE_SECONDS = 2.0
    cli.program(["train", *sys.argv[2:]])
