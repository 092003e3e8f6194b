"""One of several processes that do what a test asks for: distributed_program.py INDEX COUNT PORT SECONDS DEED...

Deeds, one for each process:
  stop    ends with the others, asked to stop
  fail    ends with an error
  die     is killed
  work    is busy, without talking to the others
"""

import os
import signal
import sys
import time

from bnn_jax import hosts
from bnn_jax.errors import UserError


def main(index: int, count: int, port: str, seconds: int, deeds: list[str]) -> int:
    """Joins the others, decides something together, and does the deed."""
    group = hosts.Group()
    try:
        group.connect(hosts.Peers(f"127.0.0.1:{port}", count, index, heartbeat_seconds=10, connect_seconds=seconds))
    except UserError as error:
        return group.fail(2, str(error))
    decided = hosts.from_first("who", lambda: [index, hosts.from_first("inside", lambda: "both")])
    print(decided, hosts.index(), hosts.count(), hosts.is_first(), flush=True)
    if deeds[index] == "fail":
        return group.fail(2, f"nothing works {deeds.count('fail')}")
    if deeds[index] == "die":
        # The other one may still be on its way here.
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
    if deeds[index] == "work":
        time.sleep(60)
    return group.finish(143, "stopped")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5:]))
