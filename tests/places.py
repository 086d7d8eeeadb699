"""What several processes do at once for test_model_settings.py; a file of its own, as each imports it at its start."""

from __future__ import annotations

import time

from simulation.llm.concurrency_limit import SharedSemaphore


def use_places(folder, limit, everyone, enough, taken, number, results):
    """Take a place as often as there is one until `enough` is set, and put the most that were taken at once."""
    places, most = SharedSemaphore("a", folder), 0
    everyone.wait(60)
    while not enough.is_set():
        if places.acquire(limit):
            taken[number] += 1
            most = max(most, sum(held for _, held, *_ in places.rows()))
            time.sleep(0.002)
            places.release()
        else:
            time.sleep(0.0005)
    results.put(most)
