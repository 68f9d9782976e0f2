"""``align rollout``: play episodes of a stage's environment with a checkpoint, and print them, without training.

Use it to debug an environment. ``--save`` stores the episodes, ``--replay`` plays stored turns again in the environment
as it is now. Heavy imports wait until it runs.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.parser import add_assignments, add_store, print_json, print_warning
from align.errors import UserError, printable

if TYPE_CHECKING:
    from align.config.base import Precision
    from align.environments.episode import Episode
    from align.environments.player import EpisodeTask
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
    parser.add_argument("--task", metavar="TASK", help="the task of an `evaluate` stage, where several have one")
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
    """Run ``align rollout``; return 0, or 1 if a replay differs."""
    from align.cli.parser import load
    from align.runner.open_store import open_store

    if options.n < 1:
        raise UserError(f"--n is {options.n}; play at least one episode.")
    pipeline = load(options)
    scene = _choose_scene(pipeline, options.stage, options.task)
    outputs = FinishedStages(pipeline, open_store(pipeline, options.store))
    rehearsal = _make_rehearsal(scene, outputs, options)
    if options.replay is not None:
        return _replay(rehearsal, options)
    return _play(rehearsal, _read_tasks(scene, outputs, options), options)


@dataclass(frozen=True)
class Scene:
    """A stage and the environment that is played: the stage's, or the environment of an ``evaluate`` stage's task."""

    node: Node
    task: str | None = None

    @property
    def config(self) -> Any:
        """The stage's settings."""
        return self.node.config

    @property
    def settings(self) -> Any:
        """The settings that have ``environment`` and ``temperature``: the stage's, or the task's."""
        return self.config if self.task is None else self.config.tasks[self.task]

    @property
    def place(self) -> str:
        """The stage, or the task with its stage, as messages name it."""
        return self.node.name if self.task is None else f"{self.node.name}.tasks.{self.task}"


def _scenes(node: Node) -> list[Scene]:
    """Return what can be played of a stage."""
    if getattr(node.config, "environment", None) is not None:
        return [Scene(node)]
    tasks = getattr(node.config, "tasks", None)
    if not isinstance(tasks, dict):
        return []
    return [Scene(node, name) for name, task in tasks.items() if getattr(task, "environment", None) is not None]


def _choose_scene(pipeline: Pipeline, stage: str | None, task: str | None) -> Scene:
    """Return the stage or the task whose environment is played."""
    from align.config.validation import suggest

    if stage is not None and stage not in pipeline.nodes:
        raise UserError(f"{pipeline.where}: there is no stage '{stage}'.{suggest(stage, pipeline.nodes)}")
    playing = {node.name: scenes for node in pipeline if (scenes := _scenes(node))}
    if stage is not None and stage not in playing:
        raise UserError(
            f"{pipeline.where}: stage '{stage}' has no `environment:` block. Stages that have one: "
            f"{', '.join(playing) or 'none'}."
        )
    if stage is None:
        # A pipeline that trains in an environment often evaluates in it, too: the stage that trains is meant.
        training = {name: scenes for name, scenes in playing.items() if scenes[0].task is None}
        playing = training or playing
    if stage is None and len(playing) != 1:
        listed = f"several stages have one: {', '.join(playing)}" if playing else "no stage has one"
        raise UserError(f"{pipeline.where}: --stage names the stage with the environment; {listed}.")
    scenes = playing[stage or next(iter(playing))]
    if task is None and len(scenes) == 1:
        return scenes[0]
    by_task = {scene.task: scene for scene in scenes if scene.task is not None}
    if task not in by_task:
        listed = f"Its tasks with an environment: {', '.join(by_task) or 'none'}.{suggest(task or '', by_task)}"
        raise UserError(f"{pipeline.where}: --task names a task of stage '{scenes[0].node.name}'. {listed}")
    return by_task[task]


@dataclass(frozen=True)
class FinishedStages:
    """A pipeline, and the store in which some of its stages are finished."""

    pipeline: Pipeline
    store: Store

    def artifact(self, name: str, place: str) -> Artifact:
        """Return the artifact of a stage that ``place`` reads. Raises ``UserError`` if there is none."""
        source = self.pipeline.nodes[self.pipeline.resolve(name)]
        artifact = self.store.obtain(source.stage.kind, source.key, source.name)
        if artifact is None:
            raise UserError(
                f"{place}: stage '{source.name}' is not finished in {self.store.root}; "
                f"`align run {self.pipeline.where} --only {source.name}` makes it."
            )
        return artifact

    def input(self, node: Node, field: str) -> Artifact:
        """Return the artifact behind an input of a stage."""
        return self.artifact(str(node.inputs[field]), f"{node.name}.{field}")


def _precision_of(scene: Scene, outputs: FinishedStages) -> Precision:
    """Return the type that the stage's ``precision`` stands for on this machine."""
    from align.models.compute.precision import resolve_precision
    from align.models.compute.processes import device_of

    return resolve_precision(scene.config.precision, device_of(outputs.pipeline.runtimes[scene.node.name]))


def _make_rehearsal(scene: Scene, outputs: FinishedStages, options: argparse.Namespace) -> Rehearsal:
    from align.environments.rehearsal import Rehearsal

    node = scene.node
    settings = scene.settings
    model_dir = _find_model(scene, outputs, options)
    return Rehearsal(
        environment=settings.environment,
        model_dir=model_dir,
        runtime=outputs.pipeline.runtimes[node.name],
        precision=_precision_of(scene, outputs),
        max_prompt_tokens=_max_prompt_tokens(scene, model_dir),
        temperature=settings.temperature if options.temperature is None else options.temperature,
        seed=node.seed,
        where=scene.place,
        user_dir=_find_user(scene, outputs),
        thinking_budget=getattr(scene.config, "thinking_budget", None),
    )


def _max_prompt_tokens(scene: Scene, model_dir: Path) -> int:
    """Return the longest prompt: the stage's, or for a task what its episodes leave of the engine's length."""
    from align.inference.engine import max_positions

    config = scene.config
    if scene.task is None:
        return int(config.max_prompt_tokens)
    length = min(config.max_context, max_positions(model_dir) or config.max_context)
    return int(length - scene.settings.environment.max_tokens)


def _find_user(scene: Scene, outputs: FinishedStages) -> Path | None:
    """Return the folder of the checkpoint that plays the user; None without such a checkpoint."""
    from align.config.environment import USER_INPUT

    node = scene.node
    user = scene.settings.environment.user
    if user is None or user.model is None:
        return None
    if scene.task is not None:
        return outputs.artifact(user.model, f"{scene.place}.environment.user.model").model
    return outputs.input(node, USER_INPUT).model


def _find_model(scene: Scene, outputs: FinishedStages, options: argparse.Namespace) -> Path:
    """Return the folder of the model that plays."""
    from align.cli.arguments import find_checkpoint

    node = scene.node
    if options.checkpoint is not None:
        folder = find_checkpoint(options.checkpoint, options.store)
        return folder if (folder / "config.json").is_file() else folder / "model"
    if scene.task is not None:
        policy = scene.config.policies[-1]
        print_warning(f"playing with stage {policy}, the last of policies; --checkpoint names another")
        return outputs.artifact(policy, f"{node.name}.policies").model
    trained = outputs.store.obtain(node.stage.kind, node.key, node.name)
    if trained is not None and (trained.path / "model").is_dir():
        print_warning(f"playing with stage {node.name}; --checkpoint names another")
        return trained.model
    field = "policy" if "policy" in type(node.config).model_fields else "model"
    if node.inputs.get(field) is None:
        raise UserError(
            f"{node.name}: an endpoint plays in this stage's environment, and `align rollout` plays with checkpoints. "
            "Name one: --checkpoint."
        )
    return outputs.input(node, field).model


def _read_tasks(scene: Scene, outputs: FinishedStages, options: argparse.Namespace) -> list[EpisodeTask]:
    """Return the tasks to play: the first rows of the stage's prompts, or of the evaluation's task."""
    if scene.task is not None:
        if options.split != "test":
            raise UserError(f"{scene.place}: --split {options.split} has no use; a task plays its own rows.")
        return _evaluated_tasks(scene, outputs)[: options.n]
    from align.data.rows import read_rows
    from align.environments.player import EpisodeTask

    artifact = outputs.input(scene.node, "prompts")
    rows = read_rows(artifact.split(options.split))[: options.n]
    if not rows:
        raise UserError(f"{scene.node.name}.prompts has no {options.split} rows; try the other --split.")
    return [EpisodeTask(row, scene.node.seed + number) for number, row in enumerate(rows)]


def _evaluated_tasks(scene: Scene, outputs: FinishedStages) -> list[EpisodeTask]:
    """Return the episodes of an evaluation's task, with the seeds that a checkpoint gets there."""
    from align.evaluation.participants import episode_tasks
    from align.evaluation.tasks.base import TaskInputs
    from align.evaluation.tasks.environment import build

    node = scene.node
    settings = scene.settings
    user = settings.environment.user
    artifacts = {
        name: outputs.artifact(name, scene.place)
        for name in (settings.rows, None if user is None else user.model)
        if name is not None
    }
    inputs = TaskInputs(
        seed=node.seed,
        base=outputs.pipeline.base,
        pairs=[],
        has_second_reward=False,
        precision=_precision_of(scene, outputs),
        warn=print_warning,
        note=print_warning,
        rows=artifacts,
        users=artifacts,
    )
    return episode_tasks(build(str(scene.task), settings, inputs).episode_set, node.seed)


def _play(rehearsal: Rehearsal, tasks: list[EpisodeTask], options: argparse.Namespace) -> int:
    from align.environments.rehearsal import play, write_episodes

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
