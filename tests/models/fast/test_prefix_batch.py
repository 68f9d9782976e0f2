"""Lines of pieces: what each sequence gives when it is read from its beginning, in values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, GPT2Config, LlamaConfig

from align.models.fast import attention as short_attention
from align.models.fast import ragged_rows
from align.models.fast.attention import ToGroups
from align.models.fast.ragged_rows import enable_ragged, hidden_states
from align.models.fast.shared_parts import MIN_PREFIX, PrefixBatch, batches_of_shared, common_prefix, share_prefixes

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def trunk(config):
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    enable_ragged(model)
    return model


@pytest.fixture(scope="module")
def llama():
    return trunk(LlamaConfig(**SMALL, num_key_value_heads=2))


def read(model, line):
    batch = line.batch()
    return hidden_states(model, batch["input_ids"], batch["position_ids"], batch["layout"])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(model, lengths, parents):
    """Every piece's states are those of the whole sequence that ends with it; so are the gradients of all of them."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 50, (length,), generator=generator).tolist() for length in lengths]
    line, wholes = PrefixBatch(), []
    for token, parent in zip(tokens, parents, strict=True):
        line.add(token, parent)
        wholes.append([*(wholes[parent] if parent is not None else []), *token])
    alone = [
        model(torch.tensor([row])).last_hidden_state[0, -len(token) :]
        for row, token in zip(wholes, tokens, strict=True)
    ]
    expected = torch.cat(alone)
    weight = torch.sin(torch.arange(expected.numel())).view_as(expected)
    wanted = gradients(model, (expected * weight).sum())
    rows = read(model, line)
    assert torch.allclose(rows, expected, atol=1e-5)
    for name, gradient in gradients(model, (rows * weight).sum()).items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * (1 + wanted[name].norm()), name


@st.composite
def trees(draw):
    lengths = draw(st.lists(st.integers(1, 25), min_size=1, max_size=12))
    parents = [draw(st.one_of(st.none(), st.integers(0, i - 1))) if i else None for i in range(len(lengths))]
    return lengths, parents


@settings(max_examples=30, deadline=None)
@given(trees(), st.sampled_from([1, 16, 512]), st.sampled_from([4, 128]), st.sampled_from([1, 300, 8_000]))
def test_each_piece_is_as_in_a_sequence_of_its_own(llama, tree, short, query_block, group_pairs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged_rows, "GROUP_PAIRS", group_pairs)
        patch.setattr(short_attention, "QUERY_BLOCK", query_block)
        patch.setattr(ragged_rows, "SHORT", short)  # both kernels, and both in one batch
        agree(llama, *tree)


def test_learned_positions_go_on_too():
    agree(trunk(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)), [9, 5, 3, 4], [None, 0, 0, 1])


def test_a_beginning_s_gradient_is_summed_in_float32(llama):
    """Of 64 pieces each adds a little: in bfloat16 the last of them would be rounded away."""
    rows = torch.zeros(64 + 1, 1, dtype=torch.bfloat16, requires_grad=True)
    line = PrefixBatch()
    beginning = line.add([0])
    for _ in range(64):
        line.add([1], beginning)
    layout = line.batch()["layout"]
    gather = ragged_rows._gather_keys(layout, heads=1)
    chosen = ToGroups.apply(rows, gather)
    grad = torch.full_like(chosen, 1 / 64)
    grad[gather.places[0]] = 4.0
    chosen.backward(grad)
    assert rows.grad[0].item() == 5.0  # one by one in bfloat16: 4 + 1/64 is 4 again
    assert rows.grad[1:].tolist() == [[1 / 64]] * 64


def test_what_is_in_common_leaves_each_a_token():
    ten = list(range(10))
    assert common_prefix([[*ten, 1], [*ten, 2]]) == 10
    assert common_prefix([[*ten, 1], ten]) == 9  # the second is the beginning of the first
    assert common_prefix([[*ten, 1], [*ten, 2], [*ten[:8], 0, 0]]) == 8 == MIN_PREFIX
    assert common_prefix([[*ten, 1], [*ten[:7], 0, 0, 0]]) == 0
    assert common_prefix([ten]) == 0
    assert common_prefix([ten, []]) == 0


@given(
    st.lists(st.lists(st.integers(0, 1), max_size=12), min_size=2, max_size=6), st.lists(st.integers(0, 1), max_size=12)
)
def test_in_common_is_what_comparing_all_would_find(rows, start):
    rows = [start + row for row in rows]
    actual = 0
    while all(actual < len(row) - 1 for row in rows) and len({row[actual] for row in rows}) == 1:
        actual += 1
    assert common_prefix(rows) == (actual if actual >= MIN_PREFIX else 0)


@st.composite
def rows_with_beginnings(draw):
    """Rows that continue earlier ones of the list from anywhere, some without a token more."""
    rows: list[list[int]] = []
    token = st.integers(0, 3)  # few values, so that rows also begin alike by chance
    for _ in range(draw(st.integers(1, 12))):
        beginning = draw(st.sampled_from(rows)) if rows and draw(st.booleans()) else []
        kept = draw(st.integers(0, len(beginning)))
        rows.append([*beginning[:kept], *draw(st.lists(token, min_size=0 if kept else 1, max_size=9))])
    return rows


@given(rows_with_beginnings())
@settings(max_examples=60, deadline=None)
def test_rows_that_share_beginnings_are_read_as_if_alone(llama, rows):
    line, places = share_prefixes(rows)
    assert [[line.tokens[place] for place in row_places] for row_places in places] == rows
    assert line.batch()["position_ids"][0].tolist() == [
        dict(zip(places[row], range(len(rows[row])), strict=True))[place]
        for place in range(len(line.tokens))
        for row in [next(row for row, row_places in enumerate(places) if place in row_places)]
    ]
    with torch.no_grad():
        states = read(llama, line)
        for row, row_places in zip(rows, places, strict=True):
            expected = llama(torch.tensor([row])).last_hidden_state[0]
            assert torch.allclose(states[row_places], expected, atol=1e-4)


def test_beginnings_at_several_depths_are_there_once():
    system, question = list(range(10)), [20, 21, 22, 23, 24]
    rows = [[*system, *question, 1], [*system, *question, 2, 3], [*system, 30], [*system, *question, 1], [40]]
    line, places = share_prefixes(rows)
    assert len(line.tokens) == 10 + 5 + 1 + 2 + 1 + 1
    assert places[0] == places[3]
    # Three tokens in common are not worth a segment.
    assert len(share_prefixes([[1, 2, 3, 4], [1, 2, 3, 5]])[0].tokens) == 8


def test_batches_count_a_common_beginning_once():
    rows = [[*range(10), last] for last in (1, 2, 3)]
    # The first row has 11 tokens, and each further row adds one.
    assert batches_of_shared(rows, 13) == [[0, 1, 2]]
    assert batches_of_shared(rows, 12) == [[0, 1], [2]]
    # Three tokens in common are read twice: 4 + 4.
    assert batches_of_shared([[1, 2, 3, 4], [1, 2, 3, 5]], 8) == [[0, 1]]
    assert batches_of_shared([[1, 2, 3, 4], [1, 2, 3, 5]], 7) == [[0], [1]]


@given(rows_with_beginnings(), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_batches_have_every_row_once_and_equal_rows_together(rows, tokens):
    batches = batches_of_shared(rows, tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    batch_of = {index: number for number, batch in enumerate(batches) for index in batch}
    for first, row in enumerate(rows):
        assert {batch_of[second] for second, other in enumerate(rows) if other == row} == {batch_of[first]}
    for batch in batches:
        members = [rows[index] for index in batch]
        # A little over the limit where common tokens are too few to be read once, or one row alone is longer.
        assert len(share_prefixes(members)[0].tokens) <= max(tokens + 3 * len(members), *map(len, members), 1)
