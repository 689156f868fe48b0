"""Files that are not waited for until they are on the disk, in every process that imports this.

That takes a third of a small run. What a process has written outlives it also where it is killed: the system keeps it.
"""

import os

os.fsync = lambda file: None
