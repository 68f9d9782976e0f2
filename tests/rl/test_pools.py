"""Pools of prompts by difficulty, and the range of advantages that are learned."""

from collections import Counter

import pytest
import torch

from align.config.stages.policy_gradient import SelectConfig
from align.rl import GrpoConfig, GRPOTrainer, RlooConfig
from align.rl.pools import PromptPools, learned_advantages
from tests.support.rl.arguments import settings
from tests.support.rl.runs import KillAt, Killed, outcome
from tests.support.rl.trainers import ROWS, make_engine, options_in, share_of_vowels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def observe(pools, scores):
    """Give the prompts of the last choice these scores, in groups of two."""
    groups = [group for group in range(len(scores)) for _ in range(2)]
    values = torch.tensor([scores[group] for group in groups])
    pools.observe(groups, values)


def pools_of(scores, **fields):
    pools = PromptPools(len(scores), SelectConfig(easy=0.9, hard=0.1, **fields))
    chosen = pools.choose(range(len(scores)), generator())
    observe(pools, [scores[prompt] for prompt in chosen])
    return pools


def test_pools_follow_the_scores_of_the_last_group():
    pools = pools_of([1.0, 0.0, 0.5, 0.9])
    assert [pools.pool_of(prompt) for prompt in range(4)] == ["easy", "hard", "between", "easy"]
    assert pools.shares() == {"easy_prompts": 0.5, "hard_prompts": 0.25, "new_prompts": 0.0}


def test_first_choices_visit_every_prompt_once():
    pools = PromptPools(6, SelectConfig(easy=0.9, hard=0.1))
    seen = []
    for update in range(3):
        chosen = pools.choose(range(2 * update, 2 * update + 2), generator(update))
        observe(pools, [0.5, 0.5])
        seen += chosen
    assert sorted(seen) == list(range(6))


def test_shares_of_pools_are_exact_over_updates():
    # 10 easy, 10 hard and 20 prompts in between; 4 prompts an update, an eighth of them easy: one every two updates.
    scores = [1.0] * 10 + [0.0] * 10 + [0.5] * 20
    pools = pools_of(scores, easy_share=0.125, hard_share=0.25)
    counts = Counter()
    for update in range(10, 20):
        chosen = pools.choose(range(4 * update, 4 * update + 4), generator(update))
        counts.update(pools.pool_of(prompt) for prompt in chosen)
    assert counts == {"easy": 5, "hard": 10, "between": 25}


def test_small_pools_are_filled_with_hard_prompts_first():
    pools = pools_of([1.0] * 4 + [0.0] * 2 + [0.5], easy_share=0.0, hard_share=0.0)
    chosen = pools.choose(range(7, 11), generator())
    assert Counter(pools.pool_of(prompt) for prompt in chosen) == {"between": 1, "hard": 2, "easy": 1}


def test_updates_larger_than_the_prompts_repeat_them():
    pools = PromptPools(3, SelectConfig(easy=0.9, hard=0.1))
    assert Counter(pools.choose(range(6), generator())) == {0: 2, 1: 2, 2: 2}


def test_advantages_outside_the_range_are_not_learned():
    advantages = torch.tensor([[0.0, 0.04], [0.5, -0.05], [-3.0, 2.0]])
    learned = learned_advantages(advantages, (0.05, 2.0))
    assert learned.tolist() == [[False, False], [True, True], [False, True]]
    assert learned_advantages(advantages, None).all()


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"easy": 0.1, "hard": 0.1}, "not below easy"),
        ({"easy": 1, "hard": 0, "easy_share": 0.6, "hard_share": 0.6}, "more than an update"),
        ({"easy": 1, "hard": 0, "advantages": [2.0, 1.0]}, "no range"),
    ],
)
def test_select_without_a_meaning_is_refused(select, message):
    with pytest.raises(ValueError, match=message):
        SelectConfig(**select)


def test_select_needs_the_scores_of_the_update_before():
    select = {"easy": 0.9, "hard": 0.1}
    with pytest.raises(ValueError, match="max_staleness"):
        GrpoConfig.for_trainer(learning_rate=1e-3, select=select, max_staleness=1)
    with pytest.raises(ValueError, match="continue_from"):
        RlooConfig.for_trainer(learning_rate=1e-3, select=select, continue_from="grpo")


def test_killed_run_with_pools_resumes_bit_for_bit(tiny_model, tmp_path):
    def run(name, callbacks=(), resume=False):
        (tmp_path / name).mkdir(exist_ok=True)
        from align.models.loading import load_policy, load_tokenizer

        options = options_in(tmp_path / name) | {
            "updates": 4,
            "samples_per_prompt": 2,
            "rollout_batch": 8,
            "per_device_train_batch_size": 4,
            "save_strategy": "steps",
            "save_updates": 1,
            "select": {"easy": 0.05, "hard": 0.0, "advantages": [0.01, 100.0]},
        }
        torch.manual_seed(0)
        trainer = GRPOTrainer(
            model=load_policy(tiny_model),
            **settings(GrpoConfig, **options),
            train_dataset=ROWS,
            processing_class=load_tokenizer(tiny_model),
            scorer=share_of_vowels,
            engine=make_engine(tiny_model),
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    expected = outcome(run("whole"))
    with pytest.raises(Killed):
        run("killed", [KillAt(2)])
    resumed = run("killed", resume=True)
    weights, logs = outcome(resumed)
    assert logs == expected[1]
    assert all(torch.equal(weights[name], expected[0][name]) for name in weights)
    assert logs[-1]["new_prompts"] == 0.0
