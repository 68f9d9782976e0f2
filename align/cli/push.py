"""``align push``: finished stages that are only here go into the bucket of the store. Imports nothing heavy."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from align.cli.artifacts import say_damage
from align.cli.parser import add_store, print_json
from align.errors import UserError
from align.store.record import DamagedArtifact

if TYPE_CHECKING:
    from align.store.artifacts import Artifact
    from align.store.remote import Remote


def run(options: argparse.Namespace) -> int:
    """upload finished stages that are only here to the store's bucket; runs do so by themselves"""
    from align.runner.open_store import open_store

    store = open_store(None, options.store)
    if store.remote is None:
        raise UserError("align push: no bucket is named; give --store s3://bucket/prefix, or set $ALIGN_STORE to it.")
    store.patience.say = lambda text: print(text, file=sys.stderr)
    artifacts, damaged = ([store.resolve(key) for key in options.keys], []) if options.keys else store.survey()
    say_damage(damaged)
    outcomes, refused = [], bool(damaged)
    for artifact in artifacts:
        kind, key = artifact.record["kind"], artifact.record["key"]
        try:
            outcome = _push(artifact, store.remote)
        except DamagedArtifact as error:  # here or in the bucket; the others go up all the same
            say_damage([error])
            outcome, refused = "damaged", True
        outcomes.append({"kind": kind, "key": key, "outcome": outcome})
        if not options.json:
            print(f"{outcome:<9}  {kind}/{key[:12]}  {store.remote.address}")
    if options.json:
        print_json(outcomes)
    elif not artifacts:
        print(f"{store.root}: empty")
    return UserError.exit_code if refused else 0


def _push(artifact: Artifact, remote: Remote) -> str:
    if remote.find(artifact.record["kind"], artifact.record["key"]) is not None:
        return "there"
    return "uploaded" if remote.push(artifact) else "another's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``align push``."""
    parser.add_argument("keys", nargs="*", metavar="KEY", help="the beginning of an artifact's key; by default all")
    add_store(parser)
