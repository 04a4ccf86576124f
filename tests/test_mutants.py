"""Configs by chance: each trains with finite numbers, or is refused in one line that names a key.

`MUTANTS=20000 python -m pytest tests/test_mutants.py` tries more of them than the usual 1,000. What a seed stands for:
`python -c "from tests.mutants import *; print(mutated(579))"`.
"""

import os
import signal
from collections import Counter
from contextlib import contextmanager

from tests.mutants import mutated, outcome

SECONDS = 5
"""Of CPU, that a config may take."""


@contextmanager
def hurried(seed):
    """An `AssertionError` for what hangs."""

    def give_up(*_):
        raise AssertionError(f"mutated({seed}) takes more than {SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_every_mutated_config_trains_or_is_refused_by_its_key():
    found, faults = Counter(), []
    count = int(os.environ.get("MUTANTS", "1000"))
    for seed in range(count):
        config, changes = mutated(seed)
        with hurried(seed):
            what, said = outcome(config)
        found[what] += 1
        if what not in ("trains", "refused"):
            faults.append(f"{seed} {changes}: {what}: {said}")
    assert not faults, "\n".join(faults[:20])
    assert min(found["trains"], found["refused"]) > count / 4, found
