"""Ticks that a reader can count on: steps of 1, 2 or 5 times a power of ten, labels of one length. Torch-free."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

STEPS = (1, 2, 5, 10)
"""Steps between ticks, in powers of ten. Matplotlib also uses steps of 1.5, 2.5, 3, 4, 6 and 8."""
MAX_TICKS = 5
MIN_PLAIN, MAX_PLAIN = 0.01, 1e5
"""Axes whose largest number is outside this range have powers of ten on them."""
ROOT_TICKS = 7
"""Ticks that a root axis has room for."""


def set_short_ticks(axes: Any) -> None:
    """Give both axes few ticks with short labels, whole numbers across; call it once the limits are final."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    steps = list(STEPS)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, steps=steps, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, steps=steps))
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        ticks = [float(tick) for tick in axis.get_major_locator().tick_values(low, high) if low <= tick <= high]
        labels = dict(zip(ticks, tick_labels(ticks), strict=True))
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FuncFormatter(lambda value, _, labels=labels: labels.get(value, "")))


def set_whole_ticks(axis: Any) -> None:
    """Give an axis of counts whole numbers, in steps of 1, 2 or 5."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=MAX_TICKS, steps=list(STEPS), integer=True))


def set_root_ticks(axis: Any) -> None:
    """Give a root-scaled axis ticks that are evenly spread on paper, at 1, 2 or 5 times a power of ten."""
    from matplotlib.ticker import FuncFormatter, Locator

    class RootLocator(Locator):
        """Ticks for the limits that the axis has when it is drawn."""

        def __call__(self) -> list[float]:
            assert self.axis is not None
            return self.tick_values(*self.axis.get_view_interval())

        def tick_values(self, vmin: float, vmax: float) -> list[float]:
            return root_ticks(vmin, vmax)

    axis.set_major_locator(RootLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the labels of evenly spaced ticks, all with the decimals that their step needs."""
    if not ticks:
        return []
    # All labels of an axis have the same form, which depends on its largest tick.
    if not MIN_PLAIN <= max(map(abs, ticks)) < MAX_PLAIN:
        return [_power_label(tick) for tick in ticks]
    step = min((after - before for before, after in itertools.pairwise(ticks)), default=abs(ticks[0]))
    # The margin keeps a step of 0.1 from looking like 0.0999.
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [f"{tick + 0:.{decimals}f}".replace("-", "−") for tick in ticks]


def root_ticks(low: float, high: float) -> list[float]:
    """Return ticks between two limits of an axis with a signed root scale: 0, and each way out from it.

    Neighbors are at least a :data:`ROOT_TICKS`-th of the axis apart, as it is drawn.
    """
    gap = (_signed_root(high) - _signed_root(low)) / ROOT_TICKS
    ticks = [0.0] if low <= 0 <= high else []
    for sign in (1, -1):
        limit = sign * (high if sign > 0 else low)
        start = max(0.0, sign * (low if sign > 0 else high))
        last = math.sqrt(start) - (gap if start else 0.0)
        for value in _nice_values(limit):
            if value >= start and math.sqrt(value) - last >= gap:
                ticks.append(sign * value)
                last = math.sqrt(value)
    return sorted(ticks)


def _nice_values(limit: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten up to ``limit``, over four powers, ascending."""
    if limit <= 0:
        return []
    top = math.floor(math.log10(limit))
    # Below 1, divide by a power of ten instead of multiplying, which gives exactly 0.2.
    values = [
        factor * 10.0**power if power >= 0 else factor / 10.0**-power
        for power in range(top - 3, top + 1)
        for factor in (1, 2, 5)
    ]
    return [value for value in values if value <= limit]


def _signed_root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def _power_label(value: float) -> str:
    """Return a tick's label with a power of ten, short enough for the fixed room to the left of the axes."""
    if not value:
        return "0"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}".replace("-", "−")
