"""`minillm train` on a rank that kills itself at the n-th call of a method: RANK OWNER.METHOD N ARGUMENTS..."""

import os
import signal
import sys
from typing import NoReturn

from minillm.cli import main as cli
from minillm.distributed import heartbeat
from minillm.engine.deepspeed import DeepSpeedEngine
from minillm.rollout.local.decoder import Decoder
from minillm.storage import atomic

OWNERS = {"Decoder": Decoder, "DeepSpeedEngine": DeepSpeedEngine, "atomic": atomic}


def main(rank: str, where: str, events: str, *arguments: str) -> NoReturn:
    if os.environ["RANK"] == rank:
        owner, _, name = where.partition(".")
        original, left = getattr(OWNERS[owner], name), int(events)

        def counted(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(OWNERS[owner], name, counted)
    heartbeat.HEARTBEAT_SECONDS, heartbeat.GRACE_SECONDS = 0.5, 2.0  # the others have heard of it all the sooner
    cli.program(["train", *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
