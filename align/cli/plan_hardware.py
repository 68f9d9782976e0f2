"""``align plan PIPELINE --hardware 8xh100``: whether and how each stage fits, with its time and cost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from align.cli.parser import print_json
from align.errors import UserError, printable

if TYPE_CHECKING:
    from align.pipeline.pipeline import Pipeline
    from align.store.store import Store

ONLY_WITH_HARDWARE: dict[str, Any] = {"price": None, "rows": None, "fill": 1.0, "model_config": []}
"""Options that have no effect without ``--hardware``, with their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``plan`` about hardware."""
    parser.add_argument(
        "--hardware",
        metavar="HARDWARE",
        help="8xh100, 1xa100-40, 4x8xh100, cpu: how each stage fits, and its cost",
    )
    parser.add_argument("--price", type=_positive, metavar="DOLLARS", help="price of a device per hour")
    parser.add_argument("--rows", type=_count, metavar="N", help="rows or prompts of data that is not built yet")
    parser.add_argument(
        "--fill", type=_share, default=1.0, metavar="SHARE", help="mean row length as a share of max_length (default 1)"
    )
    parser.add_argument(
        "--model-config",
        action="append",
        default=[],
        metavar="STAGE=FILE",
        dest="model_config",
        help="config.json of a model stage's model that is not on this machine",
    )


def run(options: argparse.Namespace, pipeline: Pipeline, store: Store) -> int:
    """Print the plan; raise ``UserError`` after it where a stage fits in no way."""
    from align.capacity.hardware import PRICES_FROM, parse_hardware
    from align.capacity.plan import plan_hardware, read_configs, refuse_what_fits_nowhere
    from align.capacity.table import lines

    hardware = parse_hardware(options.hardware, options.price)
    configs = read_configs(pipeline, options.model_config)
    plans = plan_hardware(pipeline, store, hardware, rows=options.rows, fill=options.fill, configs=configs)
    if options.json:
        print_json(
            {
                "hardware": hardware.label,
                "devices": hardware.devices,
                "device": vars(hardware.device),
                "prices_from": PRICES_FROM,
                "stages": [plan.to_json(hardware) for plan in plans],
            }
        )
    else:
        print("\n".join(printable(line) for line in lines(plans, hardware, options.fill)))
    # The table comes first: it shows why a stage does not fit.
    refuse_what_fits_nowhere(pipeline, plans, hardware)
    return 0


def refuse_without_hardware(options: argparse.Namespace) -> None:
    """Raise ``UserError`` for an option that would be ignored."""
    for name, default in ONLY_WITH_HARDWARE.items():
        if getattr(options, name) != default:
            raise UserError(f"--{name.replace('_', '-')} goes with --hardware, such as --hardware 8xh100.")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is not above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not 1 or more")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not above 0 and at most 1")
    return value
