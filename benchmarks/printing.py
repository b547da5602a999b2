"""What every benchmark prints: where it ran, then its lines, and ratios taken side by side."""

import statistics
from collections.abc import Sequence

import torch

from egom2p import resources
from egom2p.training.log import environment


def heading(doc: str | None, **settings: object) -> None:
    """The benchmark's name, the machine, torch, threads, commit and settings: what RESULTS.md asks of a figure."""
    told = environment("")
    settings_text = ", ".join(f"{name} {value}" for name, value in settings.items())
    say(f"{(doc or '').splitlines()[0].rstrip('.:')}\n{told['device']}, torch {told['torch']}, "
        f"{torch.get_num_threads()} threads, commit {(resources.commit() or 'none')[:10]}"
        + (f", {settings_text}" if settings_text else ""))


def say(line: str) -> None:
    """One line at once, also when the output is a file that someone watches."""
    print(line, flush=True)


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over rounds of above / below, each pair measured side by side."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
