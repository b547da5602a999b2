"""Rendering rate: clips a second on one core, by frame size (median of five rounds).

    python benchmarks/world.py
"""

import statistics
import time

from benchmarks.printing import heading, say
from egom2p.datasets.world import make_clip

CLIPS = 20


def main() -> None:
    heading(__doc__)
    for size in (32, 48, 64, 128):
        rates = []
        for round_number in range(5):
            started = time.perf_counter()
            for number in range(CLIPS):
                make_clip(round_number, number, size)
            rates.append(CLIPS / (time.perf_counter() - started))
        say(f"{size:4} x {size:<4} {statistics.median(rates):7.1f} clips/s a core")


if __name__ == "__main__":
    main()
