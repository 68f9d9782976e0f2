"""``align rollout``: play episodes of a stage's environment with a checkpoint, and print them; nothing is trained.

This is how an environment is debugged. ``--save`` stores the episodes, ``--replay`` plays stored turns again in the
environment as it is now. Imports nothing heavy until it runs.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.parser import add_assignments, add_store, print_json, print_warning
from align.errors import UserError, printable

if TYPE_CHECKING:
    from align.environments.episode import Episode
    from align.environments.rehearsal import Rehearsal, Replayed
    from align.pipeline.pipeline import Node, Pipeline
    from align.store.artifacts import Artifact
    from align.store.store import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "pipeline", metavar="PIPELINE", help="a pipeline file, or the name of a shipped one: calculator"
    )
    parser.add_argument("--stage", metavar="NAME", help="the stage with the environment; needed where several have one")
    parser.add_argument("--n", type=int, default=4, metavar="N", help="episodes to play, of the first prompts (4)")
    parser.add_argument("--split", choices=["train", "test"], default="test", help="prompts to play (test)")
    parser.add_argument(
        "--checkpoint",
        metavar="CHECKPOINT",
        help="a folder, a key, or PIPELINE:STAGE; by default the stage's own, else the one that it starts from",
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="sampling temperature (the stage's)")
    parser.add_argument("--save", metavar="FILE", help="write the episodes to a file of JSON lines")
    parser.add_argument("--replay", metavar="FILE", help="play the episodes of such a file again, and score them")
    add_assignments(parser, "override a field, like stages.ppo.environment.max_turns=6; repeatable")
    add_store(parser)


def run(options: argparse.Namespace) -> int:
    """Run ``align rollout``; return 0, or 1 where a replay differs."""
    from align.cli.loading import load
    from align.runner.open_store import open_store

    if options.n < 1:
        raise UserError(f"--n is {options.n}; play at least one episode.")
    pipeline = load(options)
    node = _choose_stage(pipeline, options.stage)
    store = open_store(pipeline, options.store)
    rehearsal = _make_rehearsal(pipeline, node, store, options)
    if options.replay is not None:
        return _replay(rehearsal, options)
    return _play(rehearsal, _read_prompts(pipeline, node, store, options), options)


def _choose_stage(pipeline: Pipeline, name: str | None) -> Node:
    """Return the stage whose environment is played."""
    from align.config.validation import suggest

    playing = {node.name: node for node in pipeline if getattr(node.config, "environment", None) is not None}
    if name is not None and name not in pipeline.nodes:
        raise UserError(f"{pipeline.where}: there is no stage '{name}'.{suggest(name, pipeline.nodes)}")
    if name is not None and name not in playing:
        raise UserError(
            f"{pipeline.where}: stage '{name}' has no `environment:` block. Stages that have one: "
            f"{', '.join(playing) or 'none'}."
        )
    if name is not None:
        return playing[name]
    if len(playing) != 1:
        listed = f"several stages have one: {', '.join(playing)}" if playing else "no stage has one"
        raise UserError(f"{pipeline.where}: --stage names the stage with the environment; {listed}.")
    return next(iter(playing.values()))


def _make_rehearsal(pipeline: Pipeline, node: Node, store: Store, options: argparse.Namespace) -> Rehearsal:
    from align.environments.rehearsal import Rehearsal

    config: Any = node.config
    return Rehearsal(
        environment=config.environment,
        model_dir=_find_model(pipeline, node, store, options),
        runtime=pipeline.runtimes[node.name],
        precision=config.precision,
        max_prompt_tokens=config.max_prompt_tokens,
        temperature=config.temperature if options.temperature is None else options.temperature,
        seed=node.seed,
        where=node.name,
        user_dir=_find_user(pipeline, node, store),
    )


def _find_user(pipeline: Pipeline, node: Node, store: Store) -> Path | None:
    """Return the folder of the checkpoint that plays the user, where one does."""
    from align.config.simulated_user import USER_INPUT

    return None if node.inputs.get(USER_INPUT) is None else _input(pipeline, node, store, USER_INPUT).model


def _find_model(pipeline: Pipeline, node: Node, store: Store, options: argparse.Namespace) -> Path:
    """Return the folder of the model that plays."""
    from align.cli.arguments import find_checkpoint

    if options.checkpoint is not None:
        folder = find_checkpoint(options.checkpoint, options.store)
        return folder if (folder / "config.json").is_file() else folder / "model"
    trained = store.obtain(node.stage.kind, node.key, node.name)
    if trained is not None and (trained.path / "model").is_dir():
        print_warning(f"playing with stage {node.name}; --checkpoint names another")
        return trained.model
    field = "policy" if "policy" in type(node.config).model_fields else "model"
    if node.inputs.get(field) is None:
        raise UserError(
            f"{node.name}: an endpoint plays in this stage's environment, and `align rollout` plays with checkpoints. "
            "Name one: --checkpoint."
        )
    return _input(pipeline, node, store, field).model


def _input(pipeline: Pipeline, node: Node, store: Store, field: str) -> Artifact:
    """Return the finished artifact behind an input of the stage."""
    source = pipeline.nodes[str(node.inputs[field])]
    artifact = store.obtain(source.stage.kind, source.key, source.name)
    if artifact is None:
        raise UserError(
            f"{node.name}.{field}: stage '{source.name}' is not finished in {store.root}; "
            f"`align run {pipeline.where} --only {source.name}` makes it."
        )
    return artifact


def _read_prompts(pipeline: Pipeline, node: Node, store: Store, options: argparse.Namespace) -> list[dict[str, Any]]:
    from align.data.rows import read_rows

    artifact = _input(pipeline, node, store, "prompts")
    rows: list[dict[str, Any]] = read_rows(artifact.split(options.split))[: options.n]
    if not rows:
        raise UserError(f"{node.name}.prompts has no {options.split} rows; try the other --split.")
    return rows


def _play(rehearsal: Rehearsal, rows: list[dict[str, Any]], options: argparse.Namespace) -> int:
    from align.environments.player import EpisodeTask
    from align.environments.rehearsal import play, write_episodes

    tasks = [EpisodeTask(row, rehearsal.seed + number) for number, row in enumerate(rows)]
    stored = play(rehearsal, tasks, print_warning)
    if options.save is not None:
        write_episodes(Path(options.save), stored)
    episodes = [entry.episode for entry in stored]
    if options.json:
        print_json([episode.to_json() for episode in episodes])
        return 0
    for number, episode in enumerate(episodes, start=1):
        _print_episode(number, episode)
    _print_summary(episodes)
    return 0


def _replay(rehearsal: Rehearsal, options: argparse.Namespace) -> int:
    from align.environments.rehearsal import read_episodes, replay

    stored = read_episodes(Path(options.replay))
    engine = rehearsal.open_engine(print_warning)
    try:
        results = replay(rehearsal, stored, engine)
    finally:
        engine.close()
    if options.json:
        print_json([_replayed_json(result) for result in results])
    else:
        for number, result in enumerate(results, start=1):
            print(printable(f"{number}: {_describe_replay(result)}"))
        _print_summary([result.after for result in results])
    return 1 if any(result.difference for result in results) else 0


def _replayed_json(result: Replayed) -> dict[str, Any]:
    return {
        "episode": result.after.to_json(),
        "score_before": None if math.isnan(result.before.score) else result.before.score,
        "difference": result.difference,
        "logprob_gap": result.logprob_gap,
    }


def _describe_replay(result: Replayed) -> str:
    gap = "" if result.logprob_gap is None else f", log-probabilities {result.logprob_gap:.3g} nats a token apart"
    difference = f"; differs in {result.difference}" if result.difference else ""
    return f"score {result.after.score:g} (was {result.before.score:g}){gap}{difference}"


# ---- printing ----


def _print_episode(number: int, episode: Episode) -> None:
    """Print the conversation of an episode, its calls and its scores. All of it is hostile text."""
    print(printable(f"--- episode {number}: {_describe_end(episode)}"))
    for message in episode.messages:
        print(printable(f"{message['role']}: {message['content']}".rstrip()))
        for call in message.get("tool_calls", ()):
            print(printable(f"  calls {call['name']}({_arguments(call['arguments'])})"))
    sampled = sum(episode.mask)
    print(f"  {sampled} tokens sampled, {episode.length - sampled} of the environment\n")


def _describe_end(episode: Episode) -> str:
    if episode.failure:
        return f"failed in {episode.failure}"
    parts = ", ".join(f"{name} {value:g}" for name, value in episode.parts.items())
    return f"score {episode.score:g}{f' ({parts})' if parts else ''}, {episode.stop}, {len(episode.turns)} turns"


def _arguments(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _print_summary(episodes: list[Episode]) -> None:
    scores = [episode.score for episode in episodes if not math.isnan(episode.score)]
    mean = f"mean score {sum(scores) / len(scores):.3f}" if scores else "no score"
    calls = [call for episode in episodes for call in episode.calls]
    errors = sum(bool(call.error) for call in calls)
    failed = sum(episode.stop == "failed" for episode in episodes)
    print(
        f"{len(episodes)} episodes, {mean}, {sum(len(e.turns) for e in episodes) / len(episodes):.1f} turns, "
        f"{len(calls)} calls ({errors} with an error), {failed} failed"
    )
