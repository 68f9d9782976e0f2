"""Sampling an update: the same requests, with the same seeds, however many processes share them."""

from types import SimpleNamespace

import pytest
import torch

from align.environments.episode import Episode, PolicyTurn
from align.errors import UserError
from align.inference.protocol import Response
from align.inference.thoughts import ThoughtReader
from align.models.built_in import make_tiny_tokenizer
from align.rl import metrics
from align.rl import sampler as module
from align.rl.advantages import gae
from align.rl.objectives import mask_to_learn
from align.rl.prompts import Prompts, derive_seed
from align.rl.rewards import adjust_scores
from align.rl.rollout import Rollout, join_rollouts, make_rollout
from align.rl.sampler import RolloutSampler
from align.rl.scores import as_scorer, score_rollout
from align.scoring.scored import Scored, Scorer


class Recorder:
    """An engine that notes each request and answers with one token."""

    name = "recorder"

    def __init__(self):
        self.requests = []

    def generate(self, prompts, sampling, on_progress=None):
        self.requests += [
            (tuple(prompt), sampling.request_seed(place, sample))
            for place, prompt in enumerate(prompts)
            for sample in range(sampling.n)
        ]
        return [[Response([2], [-1.0], True, "")] * sampling.n for _ in prompts]


def make_sampler(seed):
    prompts = Prompts.__new__(Prompts)
    prompts.rows = [{"id": str(index)} for index in range(6)]
    prompts.token_ids = [[10 + index] for index in range(6)]
    prompts.reader = ThoughtReader(make_tiny_tokenizer())
    config = SimpleNamespace(
        samples_per_prompt=2, prompts_per_update=4, max_tokens=4, temperature=1.0, thinking_budget=None
    )
    args = SimpleNamespace(config=config, seed=seed)
    return RolloutSampler(prompts, Recorder(), lambda rows, texts: [0.0] * len(texts), None, args)


def requests(world_size, update, seed=3, local=False):
    values = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "all_gather", lambda local_values: [local_values])
        patched.setenv("WORLD_SIZE", str(world_size))
        for process in range(world_size):
            patched.setenv("RANK", str(process))
            sampler = make_sampler(seed)
            if local:
                sampler.sample_local(update, update)
            else:
                numbers = sampler.prompt_range(update)
                indices = sampler.prompts.draw(numbers.start, len(numbers), seed)
                sampler.sample(update, indices, [derive_seed(seed, "sampling", number) for number in numbers])
            values += sampler.engine.requests
    return values


class Tasks:
    """A player that notes its tasks, and plays none."""

    def play(self, engine, tasks, **options):
        self.tasks = tasks
        return [None] * len(tasks)


def test_episodes_of_a_prompt_have_own_seeds_and_one_opening():
    sampler = make_sampler(3)
    sampler.episodes = Tasks()
    sampler._respond(sampler.prompts, [0, 1], [7, 8], samples=2)
    first, second, third, fourth = sampler.episodes.tasks
    assert first.row is second.row and third.row is fourth.row
    assert first.opening_seed == second.opening_seed != third.opening_seed == fourth.opening_seed
    assert len({task.seed for task in sampler.episodes.tasks}) == 4


class CountingEngine(Recorder):
    """An engine that reports each prompt's responses."""

    def generate(self, prompts, sampling, on_progress=None):
        for count in range(len(prompts)):
            on_progress((count + 1) * sampling.n, len(prompts) * sampling.n)
        return super().generate(prompts, sampling)


def test_sampler_reports_counts_of_responses(monkeypatch):
    monkeypatch.setattr(module, "all_gather", lambda local_values: [local_values])
    sampler = make_sampler(3)
    sampler.engine = CountingEngine()
    phases = []
    sampler.report_phase = phases.append
    sampler.sample_local(0, 0)
    assert phases == ["sampling 2/8", "sampling 4/8", "sampling 6/8", "sampling 8/8"]
    phases.clear()
    sampler.answer(sampler.prompts)
    assert phases == [f"validating {count}/6" for count in range(1, 7)]


@pytest.mark.parametrize("update", [0, 5])
def test_processes_share_out_the_requests_of_one(update):
    assert requests(2, update) == requests(1, update) == requests(3, update)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_process_s_part_of_an_update_is_that_of_its_prompts(world_size):
    assert requests(world_size, 5, local=True) == requests(1, 5)


def test_a_prompt_that_comes_again_is_answered_anew():
    seeds = [seed for update in range(4) for _, seed in requests(1, update)]
    assert len(set(seeds)) == len(seeds)
    assert requests(1, 0) != requests(1, 0, seed=4)


def test_a_missing_response_is_named():
    sampler = make_sampler(3)
    sampler.engine.generate = lambda prompts, sampling, on_progress: [[]] * len(prompts)
    with pytest.raises(RuntimeError, match="engine recorder returned 0 responses; expected 8"):
        sampler.sample_local(0, 0)


def test_metric_missing_in_one_process_is_no_error():
    def part(scores, **components):
        tensors = {"scores": torch.tensor(scores), "response_mask": torch.ones(len(scores), 1, dtype=torch.bool)}
        tensors |= {name: torch.tensor(values) for name, values in components.items()}
        lists = [[1]] * len(scores)
        return Rollout(0, [{}] * len(scores), list(range(len(scores))), lists, lists, ["a"] * len(scores), tensors)

    joined = join_rollouts([part([1.0, 2.0]), part([3.0], score_a_tokens=[5.0])])
    assert joined.tensors["scores"].tolist() == [1.0, 2.0, 3.0]
    values = joined.tensors["score_a_tokens"]
    assert values[:2].isnan().all() and values[2] == 5.0
    averages = metrics.Averages()
    joined.tensors["finished"] = torch.ones(3, dtype=torch.bool)
    metrics._add_scores(averages, joined)
    means = metrics.finish(averages.means(lambda total: total))
    assert means["score"] == 2.0 and means["score_a_tokens"] == 5.0 and means["score_a_tokens_std"] == 0.0


def test_subset_is_cut_to_its_longest_response():
    tensors = {
        "scores": torch.tensor([1.0, 2.0, 3.0]),
        "score_by_turn": torch.tensor([[1.0], [2.0], [3.0]]),
        "kl": torch.arange(12).view(3, 4),
        "response_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool(),
    }
    rollout = Rollout(0, [{}] * 3, [0, 0, 1], [[1]] * 3, [[5], [5, 6, 7, 2], [5, 2]], ["a", "b", "c"], tensors)
    subset = rollout.subset([2, 0])
    assert (subset.groups, subset.responses, subset.texts) == ([1, 0], [[5, 2], [5]], ["c", "a"])
    assert {name: tensor.tolist() for name, tensor in subset.tensors.items()} == {
        "scores": [3.0, 1.0],
        "score_by_turn": [[3.0], [1.0]],
        "kl": [[8, 9], [0, 1]],
        "response_mask": [[True, True], [True, False]],
    }
    assert subset.candidates is rollout


def scored(scores, parts):
    """Two responses, whose episodes have ``scores`` and ``parts``."""
    episodes = [Episode([1], [PolicyTurn([5], [-1.0], True, "")], score=score, parts=parts) for score in scores]
    prompts = Prompts.__new__(Prompts)
    prompts.rows, prompts.token_ids = [{"id": "0"}], [[1]]
    return make_rollout(prompts, [0], [episodes], 0)


class Brief(Scorer):
    """A scorer with a component ``brief``."""

    def __init__(self, score, brief):
        self.numbers = score, brief

    def score(self, rows, responses, truncated=None):
        score, brief = ([number] * len(rows) for number in self.numbers)
        return Scored(score, metrics={"brief": brief})


def test_components_of_gold_stand_beside_those_of_the_score():
    rollout = scored([0.0, 0.0], {})
    sampler = RolloutSampler(None, None, Brief(1.0, 0.25), Brief(0.5, 99.0), SimpleNamespace(config=None))
    sampler.score(rollout)
    numbers = {name: tensor.tolist() for name, tensor in rollout.tensors.items() if name.startswith(("score", "gold"))}
    assert numbers == {
        "scores": [1.0, 1.0],
        "score_brief": [0.25, 0.25],
        "gold": [0.5, 0.5],
        "score_gold_brief": [99.0, 99.0],
    }


def test_environment_part_with_name_of_a_reward_is_refused():
    sampler = RolloutSampler(None, None, Brief(1.0, 0.25), None, SimpleNamespace(config=None))
    with pytest.raises(UserError, match=r"^environment: it scores 'brief', .* set another `name` for that reward"):
        sampler.score(scored([0.0, 0.0], {"brief": 1.0}))


def test_cut_off_episode_that_ends_a_turn_is_unfinished():
    """Twice the same turn (5, EOS); the second episode had a call in it whose result found no room."""
    turn = PolicyTurn([5, 2], [-1.0, -1.0], True, "")
    prompts = Prompts.__new__(Prompts)
    prompts.rows, prompts.token_ids = [{"id": "0"}], [[1]]
    rollout = make_rollout(
        prompts, [0], [[Episode([1], [turn], score=1.0), Episode([1], [turn], [], stop="max_turns", score=1.0)]], 0
    )
    finished, mask = rollout.tensors["finished"], rollout.tensors["response_mask"]
    assert finished.tolist() == [True, False]
    assert adjust_scores(torch.ones(2), finished, missing_eos_penalty=3.0).tolist() == [1.0, -2.0]
    assert mask_to_learn(rollout, "mask").tolist() == [[True, True], [False, False]]
    # The value after the last token counts where the episode was cut off: 1 - 0.5, and 1 + 4 - 0.5.
    rewards, values = torch.tensor([[0.0, 1.0]] * 2), torch.tensor([[0.5, 0.5, 4.0]] * 2)
    advantages, _ = gae(rewards, values, mask, finished, gamma=1.0, lam=1.0, truncation="bootstrap")
    assert advantages.tolist() == [[0.5, 0.5], [4.5, 4.5]]


THOUGHT = Response(
    # Three tokens of a thought, two forced ones, two of an answer.
    [4, 5, 6, 90, 91, 7, 2],
    [-1.0, -1.0, -1.0, 0.0, 0.0, -1.0, -1.0],
    True,
    "thought answer",
    thought_tokens=5,
    thought_end=8,
    forced=[3, 4],
)
OPEN = Response([8, 9], [-1.0, -1.0], False, "open", thought_tokens=2, thought_end=4, is_open=True)
PLAIN = Response([10, 2], [-1.0, -1.0], True, "plain")


def thinking(*responses, update=0):
    prompts = Prompts.__new__(Prompts)
    prompts.rows, prompts.token_ids = [{"id": "0"}], [[1]]
    return make_rollout(prompts, [0], [list(responses)], update)


def test_forced_tokens_are_not_learned():
    rollout = thinking(THOUGHT, OPEN)
    sampled = [[True, True, True, False, False, True, True], [True, True] + [False] * 5]
    assert rollout.tensors["response_mask"].tolist() == sampled
    assert rollout.pack([0, 1], 0, "padded")["response_mask"].tolist() == sampled
    assert mask_to_learn(rollout, "learn").tolist() == sampled
    assert rollout.tokens == 7
    # A rollout with forced tokens in other rows only packs like any other.
    assert rollout.pack([1], 0, "padded")["response_mask"].tolist() == [[True, True]]


def test_advantages_pass_over_forced_tokens_within_a_turn():
    # One reward of 1 at the end; gamma 1, lambda 1, values 0: all five sampled tokens get 1, also with a turn discount.
    rollout = thinking(THOUGHT)
    mask, forced = rollout.tensors["response_mask"], rollout.tensors["forced"]
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    arguments = (rewards, torch.zeros(1, 8), mask, rollout.tensors["finished"])
    settings = {"gamma": 1.0, "lam": 1.0, "truncation": "terminal", "turn_discount": 0.5}
    advantages, _ = gae(*arguments, **settings, forced=forced)
    assert advantages.tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]]
    # An environment's tokens in the same place end a turn.
    assert gae(*arguments, **settings)[0].tolist() == [[0.5, 0.5, 0.5, 0.0, 0.0, 1.0, 1.0]]


def test_scorers_read_answers_and_know_thoughts():
    seen = []

    def score(rows, responses):
        seen.extend((str(text), text.thought, text.full_text, text.is_open) for text in responses)
        return [0.0] * len(responses)

    score_rollout(thinking(THOUGHT, OPEN, PLAIN), as_scorer(score))
    assert seen == [
        ("answer", "thought ", "thought answer", False),
        ("", "open", "open", True),
        ("plain", "", "plain", False),
    ]


def test_thoughts_and_answers_are_logged_separately():
    joined = join_rollouts([thinking(PLAIN), thinking(THOUGHT, OPEN)])
    joined.tensors["scores"] = torch.zeros(3)
    assert joined.answer_lengths.tolist() == [2, 2, 0]
    averages = metrics.Averages()
    metrics._add_scores(averages, joined)
    means = averages.means(lambda totals: totals)
    # Thoughts of 0, 5 and 2 tokens; answers of 2, 2 and 0; 2 forced tokens; 2 + 5 + 2 sampled ones.
    names = ("thought_length", "answer_length", "open_thoughts", "forced_tokens", "length")
    assert [means[name] * 3 for name in names] == pytest.approx([7, 4, 1, 2, 9])
    assert "open_thoughts" not in metrics_of(thinking(PLAIN))


def metrics_of(rollout):
    rollout.tensors["scores"] = torch.zeros(len(rollout))
    averages = metrics.Averages()
    metrics._add_scores(averages, rollout)
    return averages.means(lambda totals: totals)
