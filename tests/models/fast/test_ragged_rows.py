"""Ragged rows: what each sequence alone would give, in values and gradients."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaModel

from align.models.fast import attention as short_attention
from align.models.fast import ragged_rows
from align.models.fast.ragged_rows import can_run_ragged, enable_ragged, hidden_states, make_layout, try_ragged
from tests.support.models.families import family_model

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def trunk(config, seed=0):
    torch.manual_seed(seed)
    return AutoModel.from_config(config)


@pytest.fixture(scope="module")
def llama():
    return trunk(LlamaConfig(**SMALL, num_key_value_heads=2))


def rows_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (length,), generator=generator) for length in lengths]


def together(model, rows):
    positions = torch.tensor([[place for row in rows for place in range(len(row))]])
    return hidden_states(model, torch.cat(rows)[None], positions, make_layout([len(row) for row in rows]))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(model, rows):
    alone = [model(row[None]).last_hidden_state[0] for row in rows]
    expected = torch.cat(alone)
    weight = torch.sin(torch.arange(expected.numel())).view_as(expected)
    wanted = gradients(model, (expected * weight).sum())
    enable_ragged(model)
    actual = together(model, rows)
    assert torch.allclose(actual, expected, atol=1e-5)
    for name, gradient in gradients(model, (actual * weight).sum()).items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * (1 + wanted[name].norm()), name


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=20),
    st.sampled_from([1, 8, 512]),
    st.sampled_from([4, 128]),
    st.sampled_from([1, 300, 8_000]),
)
def test_each_row_is_as_if_alone(llama, lengths, short, query_block, group_pairs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged_rows, "GROUP_PAIRS", group_pairs)
        patch.setattr(short_attention, "QUERY_BLOCK", query_block)
        patch.setattr(ragged_rows, "SHORT", short)  # both kernels, and both in one batch
        agree(llama, rows_of(lengths))


@pytest.mark.parametrize(
    ("queries", "keys", "blocks"),
    [
        (100, 100, [(0, 100, 100)]),
        (192, 200, [(0, 192, 200)]),  # the rest is half a block: it joins the only one
        (300, 310, [(0, 128, 138), (128, 300, 310)]),
        (321, 321, [(0, 128, 128), (128, 256, 256), (256, 321, 321)]),
    ],
)
def test_a_block_of_queries_has_the_keys_up_to_its_end(queries, keys, blocks):
    computed = short_attention._query_blocks(queries, keys)
    assert [(part.start, part.stop, seen.stop) for part, seen in computed] == blocks


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4),
    ],
    ids=["qwen3", "gpt2"],
)
def test_other_architectures(config):
    model = trunk(config).eval()
    assert can_run_ragged(model)
    agree(model, rows_of([3, 17, 9, 1]))


def test_groups_take_the_least_work_and_places_are_given_back(monkeypatch):
    """10 and 9, 8 and 7, and 3 alone: 200 + 128 + 9 pairs and 30 a group; 10, 9 and 8 together would take 448."""
    monkeypatch.setattr(ragged_rows, "GROUP_PAIRS", 30)
    layout = make_layout([10, 3, 9, 8, 7])
    assert layout["shapes"] == [(2, 10, 10), (2, 8, 8), (1, 3, 3)]  # 200 + 128 + 9 + 90
    assert layout["slot_tokens"][layout["token_slots"]].tolist() == list(range(37))
    assert (layout["slot_tokens"] == 37).sum() == 2  # 9 is filled up to 10, 7 to 8


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=9),
    st.sampled_from([1, 500, 10**6]),
    st.sampled_from([1, 8_000, 10**6]),
)
def test_no_other_cut_of_the_sorted_segments_takes_less_work(sizes, worth, most):
    lengths, prefixes = [length for length, _ in sizes], [prefix for _, prefix in sizes]

    def pairs(group):
        longest = max(lengths[i] for i in group)
        return len(group) * longest * (longest + max(prefixes[i] for i in group))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged_rows, "GROUP_PAIRS", worth)
        patch.setattr(ragged_rows, "MAX_PAIRS", most)
        groups = ragged_rows._group_segments(lengths, prefixes)
    order = [i for group in groups for i in group]
    assert sorted(order) == list(range(len(sizes)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    assert all(len(group) == 1 or pairs(group) <= most for group in groups)
    work = sum(pairs(group) + worth for group in groups)
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        starts = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(order)]
        others = [order[start:end] for start, end in itertools.pairwise(starts)]
        if all(len(group) == 1 or pairs(group) <= most for group in others):
            assert work <= sum(pairs(group) + worth for group in others)


def test_segments_with_equal_prefixes_share_a_group(monkeypatch):
    monkeypatch.setattr(ragged_rows, "GROUP_PAIRS", 1)
    layout = make_layout([10, 4, 4, 5, 4], [None, 0, 0, None, 1])
    assert layout["shapes"] == [(1, 10, 10), (1, 5, 5), (1, 4, 18), (2, 4, 14)]
    assert layout["masks"][3].shape == (1, 1, 4, 14)  # both see all of the 10
    assert layout["key_tokens"][layout["token_keys"]].tolist() == list(range(27))
    for place, token, count in layout["prefix_copies"]:
        assert layout["key_tokens"][place : place + count].tolist() == list(range(token, token + count))


def test_unlike_beginnings_in_a_group_have_masks_of_their_own(monkeypatch):
    monkeypatch.setattr(ragged_rows, "GROUP_PAIRS", 20)
    layout = make_layout([10, 9, 3, 3], [None, None, 0, 1])
    assert layout["shapes"][1] == (2, 3, 13)
    mask = layout["masks"][1]
    assert mask.shape == (2, 1, 3, 13)
    assert mask[0, 0].tolist() == [[True] * (11 + i) + [False] * (2 - i) for i in range(3)]
    assert mask[1, 0, 0].tolist() == [True] * 9 + [False] + [True, False, False]


def test_what_only_looks_at_a_window_is_refused():
    model = trunk(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4))
    assert not can_run_ragged(model)
    assert can_run_ragged(trunk(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None)))


def test_generation_and_padded_batches_work_as_before():
    model = trunk(LlamaConfig(**SMALL, num_key_value_heads=2))
    ids = torch.stack(rows_of([6, 6]))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = model(ids, attention_mask=mask).last_hidden_state
    enable_ragged(model)
    assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, expected)


def test_saved_weights_do_not_name_it(tmp_path):
    model = trunk(LlamaConfig(**SMALL, num_key_value_heads=2))
    enable_ragged(model)
    model.save_pretrained(tmp_path)
    assert ragged_rows.NAME not in (tmp_path / "config.json").read_text()
    assert "attn_implementation" not in json.loads((tmp_path / "config.json").read_text())


def test_a_model_that_drops_the_layout_is_named():
    class Deaf(LlamaModel):
        def forward(self, *args, layout=None, **options):
            return super().forward(*args, **options)

    torch.manual_seed(0)
    model = Deaf(LlamaConfig(**SMALL, num_key_value_heads=2))
    enable_ragged(model)
    with pytest.raises(RuntimeError, match=r"LlamaAttention does not pass .* set padding_free off"):
        together(model, rows_of([3, 2]))


def test_attention_with_more_to_it_is_refused(llama):
    q = torch.zeros(1, 4, 3, 8)
    with pytest.raises(RuntimeError, match=r"asks for softcap.* set padding_free off"):
        ragged_rows.ragged_attention(llama, q, q, q, None, layout=make_layout([3]), softcap=30.0)
    with pytest.raises(RuntimeError, match=r"asks for dropout.* set padding_free off"):
        ragged_rows.ragged_attention(llama, q, q, q, None, layout=make_layout([3]), dropout=0.1)


def test_model_that_drops_the_layout_is_padded() -> None:
    model = family_model("nemotron")
    assert can_run_ragged(model)
    assert not try_ragged(model)
    assert model.config._attn_implementation == "sdpa"
    assert try_ragged(family_model("llama"))
