"""A rank of `accelerate launch` that makes many runs: it imports everything once, then forks for each.

accelerate launch --config_file <config> tests/distributed/serve.py ADDRESS

Every run is a process of its own, in the environment that the launcher made, with a rendezvous of its own.
"""

import importlib
import importlib.util
import os
import sys
import traceback
from multiprocessing.connection import Client
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

SCRIPTS = ("tests.distributed.train", "tests.distributed.parse")
OPTIONAL = ("deepspeed",)
"""What accelerate imports where it is installed."""


def serve(address: str) -> None:
    """Takes (script, arguments, log, environment) and answers the child's pid, then (its status, its CPU seconds)."""
    with Client(address, "AF_UNIX") as caller:
        for module in (*SCRIPTS, *filter(importlib.util.find_spec, OPTIONAL)):
            importlib.import_module(module)
        caller.send(int(os.environ.get("RANK", 0)))
        while (task := caller.recv()) is not None:
            child = os.fork()
            if not child:
                run(*task)
            caller.send(child)
            _, status, usage = os.wait4(child, 0)
            caller.send((os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime))


def run(script: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """`main(arguments)` of a script; its output goes to `log`. Ends the process."""
    status = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= {**environment, "TORCHELASTIC_USE_AGENT_STORE": "False"}  # rank 0 keeps the store
        importlib.import_module(script).main(arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # everything is written; the profiler's threads may abort an ordinary exit of a busy machine


if __name__ == "__main__":
    serve(sys.argv[1])
