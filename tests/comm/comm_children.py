"""What the processes of the comm tests run."""

import time

from whalefall import comm


def own_region(name: str) -> None:
    comm.Region.create(name, 4096)
    time.sleep(60)
