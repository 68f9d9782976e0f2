"""Micro-batches: the same numbers whatever is shared, padded or split."""

import pytest
import torch

from align.config.tuning import FullTuning
from align.models.fast.ragged_rows import can_run_ragged, enable_ragged, make_layout
from align.models.loading import load_policy, load_reward
from align.rl.model import PolicyAndCritic, critic_from_policy, critic_from_reward
from align.rl.packing import pack, plan

PROMPTS = [[5, 6, 7], [5, 6, 7], [9], [9]]
RESPONSES = [[10, 11, 2], [12, 2], [13, 14, 15, 16], [2]]
GROUPS = [0, 0, 1, 1]


def test_one_padded_row_per_response():
    batch = pack(PROMPTS, RESPONSES, GROUPS, pad_id=3, form="padded")
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 10, 11, 2],
        [5, 6, 7, 12, 2, 3],
        [9, 13, 14, 15, 16, 3],
        [9, 2, 3, 3, 3, 3],
    ]
    # row 0: before 10 is position 2, before 11 is 3, before EOS 4, at the end 5
    assert batch["positions"][0].tolist() == [2, 3, 4, 5, 0]
    assert batch["positions"][1].tolist() == [8, 9, 10, 0, 0]
    assert batch["targets"][1].tolist() == [12, 2, 0, 0]
    assert "attention_mask" not in batch


def test_ragged_rows_stand_end_to_end():
    batch = pack(PROMPTS, RESPONSES, GROUPS, pad_id=3, form="ragged")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 10, 11, 2, 5, 6, 7, 12, 2, 9, 13, 14, 15, 16, 9, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]]
    assert batch["positions"].tolist() == [[2, 3, 4, 5, 0], [8, 9, 10, 0, 0], [11, 12, 13, 14, 15], [16, 17, 0, 0, 0]]


def test_responses_share_their_prompt_and_do_not_see_each_other():
    batch = pack(PROMPTS, RESPONSES, GROUPS, pad_id=3, form="shared")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 10, 11, 2, 12, 2, 9, 13, 14, 15, 16, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2, 3, 4, 1]]
    assert batch["positions"][1].tolist() == [2, 6, 7, 0, 0]
    lengths, parents = [3, 3, 2, 1, 4, 1], [None, 0, 0, None, 3, 3]
    assert batch["layout"]["prefix_copies"] == make_layout(lengths, parents)["prefix_copies"]


LONG = [[*range(20, 32), *prompt] for prompt in PROMPTS]
"""Prompts that begin alike, as a chat template has it."""


def test_prompts_share_what_they_begin_with():
    batch = pack(LONG, RESPONSES, [0, 1, 2, 2], pad_id=3, form="shared")
    rest = [5, 6, 7, 10, 11, 2, 5, 6, 7, 12, 2, 9, 13, 14, 15, 16, 2]
    assert batch["input_ids"].tolist() == [[*range(20, 32), *rest]]
    places = [*range(12), *range(12, 18), *range(12, 17), 12, *range(13, 17), 13]
    assert batch["position_ids"].tolist() == [places]
    assert batch["positions"].tolist() == [
        [14, 15, 16, 17, 0],
        [20, 21, 22, 0, 0],
        [23, 24, 25, 26, 27],
        [23, 28, 0, 0, 0],
    ]


@pytest.fixture(scope="module")
def model(tiny_model):
    policy = load_policy(tiny_model)
    critic = critic_from_policy(policy, FullTuning(), seed=0)
    torch.manual_seed(1)
    critic.head.weight.data.normal_()
    for trunk in (policy, critic.trunk):
        assert can_run_ragged(trunk)
        enable_ragged(trunk)
    return PolicyAndCritic(policy, critic, temperature=0.8)


def outputs(model, batch):
    results = model(batch, reference=True)
    loss = (results["logprobs"] ** 2).sum() + (results["values"] ** 2).sum() + results["entropy"].sum()
    model.zero_grad()
    loss.backward()
    return results, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("prompts", [PROMPTS, LONG], ids=["short", "with a common beginning"])
@pytest.mark.parametrize("change", ["ragged", "shared", "padded more"])
def test_packing_and_padding_change_no_number_and_no_gradient(model, change, prompts):
    expected, gradients = outputs(model, pack(prompts, RESPONSES, GROUPS, pad_id=3, form="padded"))
    batch = pack(prompts, RESPONSES, GROUPS, pad_id=3, form=change if change != "padded more" else "padded")
    if change == "padded more":
        extra = torch.full((4, 5), 3)
        length = batch["input_ids"].shape[1]
        batch["input_ids"] = torch.cat([batch["input_ids"], extra], dim=1)
        batch["positions"] = batch["positions"] // length * (length + 5) + batch["positions"] % length
    actual, others = outputs(model, batch)
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, atol=1e-5), name
    for a, b in zip(gradients, others, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


GAPS = [[True, False, True], [True, True], [True, False, False, True], [True]]


@pytest.mark.parametrize("form", ["padded", "ragged", "shared"])
def test_tokens_of_an_environment_are_read_and_get_no_number(model, form):
    full = model(pack(PROMPTS, RESPONSES, GROUPS, pad_id=3, form="padded"), reference=True)
    results = model(pack(PROMPTS, RESPONSES, GROUPS, pad_id=3, form=form, masks=GAPS), reference=True)
    for i, mask in enumerate(GAPS):
        for t, sampled in enumerate(mask):
            # The same as if all tokens were the policy's: it has read those before.
            for name in ("logprobs", "entropy", "ref_logprobs", "values"):
                expected = full[name][i, t].item() if sampled else 0.0
                assert results[name][i, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-5), (name, i, t)
        end = len(mask)
        assert results["values"][i, end].item() == pytest.approx(full["values"][i, end].item(), rel=1e-5, abs=1e-5)


def test_log_probabilities_are_those_of_the_plain_model(model):
    results = model(pack(PROMPTS, RESPONSES, GROUPS, pad_id=3, form="shared"), reference=True)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.tensor([prompt + response])
        log_p = torch.log_softmax(model.policy(ids).logits[0].float() / 0.8, dim=-1)
        for t, token in enumerate(response):
            row = log_p[len(prompt) - 1 + t]
            assert results["logprobs"][i, t].item() == pytest.approx(row[token].item(), abs=1e-5)
            assert results["entropy"][i, t].item() == pytest.approx(-(row.exp() * row).sum().item(), abs=1e-5)
    assert torch.equal(results["ref_logprobs"], results["logprobs"])


def test_new_critic_gives_reward_score_at_last_token(tiny_model, tiny_reward):
    reward = load_reward(tiny_reward)
    critic = critic_from_reward(reward, FullTuning(), seed=0)
    enable_ragged(critic.trunk)
    model = PolicyAndCritic(load_policy(tiny_model), critic, temperature=1.0)
    values = model(pack(PROMPTS, RESPONSES, GROUPS, pad_id=3, form="ragged"), policy=False)["values"]
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        score = reward(torch.tensor([prompt + response])).logits.item()
        assert values[i, len(response)].item() == pytest.approx(score, abs=1e-4)


def test_plan_covers_responses_once_and_keeps_groups():
    groups = [i // 2 for i in range(16)]
    lengths = [10 + 3 * (i // 2) for i in range(16)]
    planned = plan(groups, lengths, num_mini_batches=2, generator=torch.Generator().manual_seed(0))
    assert [len(mini) for mini in planned] == [8, 8]
    assert sorted(i for mini in planned for i in mini) == list(range(16))
    for mini in planned:
        assert {groups[i] for i in mini} == {groups[i] for i in mini[::2]}
        assert [lengths[i] for i in mini] == sorted(lengths[i] for i in mini)


def test_groups_are_shuffled_between_epochs():
    groups = list(range(16))
    orders = [plan(groups, [5] * 16, num_mini_batches=2, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    assert set(orders[0][0]) != set(orders[1][0])
