"""Stored rollouts: what a run writes of every update, after kills and of episodes."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from align.environments.journal import CallResult
from align.environments.results import Scores
from align.models.chat.token_texts import TokenTexts
from align.rl.checkpoint import last_checkpoint
from align.rl.rollout import make_rollout
from align.rl.rollout_tables import read_episode, rollout_table
from align.scoring.scored import Scored, Scorer
from align.store.rollouts import ROLLOUTS, open_rollouts, read_settings, rollout_rows
from tests.support.report.example_episodes import play
from tests.support.rl.runs import KillAt, Killed
from tests.support.rl.trainers import ROWS
from tests.support.stored_rollouts import stored_rows

MEASURES = ("logprobs", "ref_logprobs", "token_kl", "entropy", "values", "raw_advantages", "advantages")


class Reasons(Scorer):
    """A reward with a part and a reason, as a list of rewards returns them."""

    def score(self, rows, texts, truncated=None):
        wrong = [float(len(text) % 2) for text in texts]
        math = Scored([0.5] * len(texts), metrics={"unequal": wrong})
        return Scored([1.0 - value for value in wrong], {"math": math})


def test_every_response_is_stored_with_its_measurements(make_trainer, tmp_path):
    trainer = make_trainer(updates=2, scorer=Reasons(), gold=lambda rows, texts: [0.25] * len(texts))
    trainer.train()
    rows = stored_rows(tmp_path / "run" / ROLLOUTS)
    batch = trainer.config.rollout_batch
    assert len(rows) == 2 * batch
    assert [row["update"] for row in rows] == [1] * batch + [2] * batch
    assert [row["index"] for row in rows] == [*range(batch)] * 2 and {row["round"] for row in rows} == {0}
    for row in rows:
        tokens = row["tokens"]
        assert all(len(row[name]) == tokens for name in (*MEASURES, "token_ids", "token_texts", "response_mask"))
        assert row["prompt"] in [source["prompt"] for source in ROWS]
        assert row["kl"] == pytest.approx(sum(row["token_kl"]), abs=1e-5)
        assert row["learned"] and all(row["learn_mask"]) and row["gold"] == 0.25
        # The scores by part, and the reason of the part that has one.
        is_wrong = len(row["response"]) % 2 == 1
        assert row["scores"] == {"math": 0.5, "math_unequal": float(is_wrong)}
        assert row["reasons"] == ({"math": "unequal"} if is_wrong else {})
    assert {tuple(row["weights_update"]) for row in rows if row["update"] == 2} <= {(1,) * n for n in range(1, 99)}
    assert len({row["values"][0] for row in rows}) > 1 and any(row["kl"] for row in rows[batch:])
    assert read_settings(tmp_path / "run" / ROLLOUTS)["rollout_batch"] == batch


@pytest.mark.parametrize("killed_at", [8, 10])  # before the third update, and in the middle of it
def test_killed_run_stores_the_rollouts_of_a_whole_run(make_trainer, tmp_path, killed_at):
    fields = {"updates": 4, "num_epochs": 2, "num_mini_batches": 2, "save_strategy": "steps", "save_updates": 2}
    make_trainer(output_dir=str(tmp_path / "whole"), **fields).train()
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        make_trainer(output_dir=str(folder), callbacks=[KillAt(killed_at)], **fields).train()
    assert set(open_rollouts(folder / ROLLOUTS).to_table()["update"].to_pylist()) == {1, 2, 3}
    make_trainer(output_dir=str(folder), **fields).train(resume_from_checkpoint=str(last_checkpoint(folder)))
    tables = [open_rollouts(each / ROLLOUTS).to_table() for each in (tmp_path / "whole", folder)]
    assert tables[1].equals(tables[0]) and len(tables[0]) == 4 * 8


def test_share_of_prompts_is_stored(make_trainer, tmp_path):
    trainer = make_trainer(updates=4, rollouts={"keep": 0.5})
    trainer.train()
    rows = stored_rows(tmp_path / "run" / ROLLOUTS)
    names = {row["prompt_id"] for row in rows}
    assert 0 < len(names) < len(ROWS)
    # A stored prompt has all of its responses in every update that draws it.
    for update in {row["update"] for row in rows}:
        groups = [row["group"] for row in rows if row["update"] == update]
        assert all(groups.count(group) == trainer.config.samples_per_prompt for group in groups)
    make_trainer(updates=1, rollouts={"keep": 0.0}, output_dir=str(tmp_path / "none")).train()
    assert not (tmp_path / "none" / ROLLOUTS).exists()


def test_episode_of_a_row_is_the_episode_that_was_played(make_trainer):
    ask = [{"role": "user", "content": "1+1?"}]
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    script = [call, CallResult("one"), "2", Scores(0.75, {"form": 0.25}, [0.25, 0.5])]
    failed = [call, RuntimeError("no database")]
    trainer = make_trainer(updates=1)
    episodes = [play(ask, script), play(ask, failed)]
    rollout = make_rollout(trainer.prompts, [0], [episodes], update=0)
    trainer.sampler.episodes, trainer.sampler.scorer = object(), None
    trainer.sampler.score(rollout)
    rollout.tensors |= {"kl": torch.zeros(rollout.tensors["response_mask"].shape)}
    table = rollout_table(rollout, TokenTexts(trainer.processing_class))
    assert isinstance(table, pa.Table)
    rows = list(rollout_rows(table))
    assert [read_episode(row).to_json() for row in rows] == [episode.to_json() for episode in episodes]
    assert [row["stop"] for row in rows] == ["finished", "failed"] and "no database" in rows[1]["failure"]
    assert [call["name"] for call in rows[0]["calls"]] == ["add"] and rows[0]["turn_scores"] == [0.25, 0.5]
    assert rows[0]["response_mask"].count(False) == len(episodes[0].observations[0])
