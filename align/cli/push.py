"""``align push``: upload finished stages to the store's bucket. Has no heavy imports."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from align.cli.artifacts import print_damage
from align.cli.parser import add_store, print_json
from align.errors import UserError
from align.store.record import DamagedArtifact

if TYPE_CHECKING:
    from align.store.artifacts import Artifact
    from align.store.remote import Remote


def run(options: argparse.Namespace) -> int:
    """Run ``align push``."""
    from align.runner.open_store import open_store

    store = open_store(None, options.store)
    if store.remote is None:
        raise UserError(
            "align push: the store has no bucket; give --store s3://bucket/prefix, or set $ALIGN_STORE to it."
        )
    # A bucket that does not answer is retried; say so instead of waiting silently.
    store.retry.log = lambda text: print(text, file=sys.stderr)
    has_damage = False
    if options.keys:
        artifacts = [store.resolve(key) for key in options.keys]
    else:
        artifacts, damaged = store.survey()
        print_damage(damaged)
        has_damage = bool(damaged)
    outcomes = []
    for artifact in artifacts:
        kind, key = artifact.record["kind"], artifact.record["key"]
        try:
            outcome = _push(artifact, store.remote)
        except DamagedArtifact as error:  # here or in the bucket; the other artifacts are uploaded all the same
            print_damage([error])
            outcome, has_damage = "damaged", True
        outcomes.append({"kind": kind, "key": key, "outcome": outcome})
        if not options.json:
            print(f"{outcome:<9}  {kind}/{key[:12]}  {store.remote.address}")
    if options.json:
        print_json(outcomes)
    elif not artifacts:
        print(f"{store.root}: empty")
    return UserError.exit_code if has_damage else 0


def _push(artifact: Artifact, remote: Remote) -> str:
    """Upload an artifact unless the bucket has it; return what happened, in a word or two."""
    if remote.find(artifact.record["kind"], artifact.record["key"]) is not None:
        return "there"
    return "uploaded" if remote.push(artifact) else "another's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align push``."""
    parser.add_argument("keys", nargs="*", metavar="KEY", help="the beginning of an artifact's key (default: all)")
    add_store(parser)
