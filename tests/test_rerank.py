"""Ranking again: how scores are blended, and what the cross-encoder learns from."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from serve.blend import blend
from shipyard.rerank import LIST, Lists

scores = npst.arrays(np.float32, (3, 6), elements=st.floats(-100, 100, width=32))


@given(scores, scores, st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
@settings(deadline=None, max_examples=80)
def test_a_blend_is_from_0_to_1_and_keeps_what_both_agree_on(first, second, weight):
    mixed = blend(first, second, weight)
    assert mixed.shape == first.shape and (mixed >= 0).all() and (mixed <= 1 + 1e-12).all()
    better = (first[:, :, None] >= first[:, None, :]) & (second[:, :, None] >= second[:, None, :])
    assert (mixed[:, :, None] - mixed[:, None, :])[better].min() >= -1e-12
    for line in range(3):
        np.testing.assert_array_equal(blend(first[line], second[line], weight), mixed[line])


@given(scores, scores)
@settings(deadline=None, max_examples=40)
def test_without_weight_search_decides_alone_and_with_all_of_it_the_reader(first, second):
    for weight, decides in ((0.0, first), (1.0, second)):
        mixed = blend(first, second, weight)
        assert (np.diff(mixed, axis=1)[np.diff(decides, axis=1) == 0] == 0).all()
        assert (np.diff(mixed, axis=1) * np.diff(decides.astype(float), axis=1) >= 0).all()


def lists(relevant, ranked, gains=None, rows=20):
    cut = SimpleNamespace(
        relevant=np.array(relevant), gains=None if gains is None else np.array(gains, np.float32), name="search",
        batches=SimpleNamespace(rows={"search": np.arange(1, rows + 1)}),
    )  # fmt: skip
    shop = SimpleNamespace(texts=[f"product {k}" for k in range(rows)], text_of_row=np.arange(rows))
    found = SimpleNamespace(ranked=np.array(ranked), scores=-np.arange(np.size(ranked), dtype=float)[None])
    return Lists(shop, cut, found)


def test_a_list_holds_answers_by_their_gains_and_what_search_ranks_beside_them():
    of = lists([[3, 7, 0]], [list(range(1, 16))], [[1.0, 0.1, 0]])
    rows, worth = of.draw(np.array([0]), np.random.default_rng(1))
    assert rows.shape == worth.shape == (1, LIST)
    assert dict(zip(rows[0, :2].tolist(), worth[0, :2].tolist(), strict=True)) == {
        3: pytest.approx(1 / 1.1), 7: pytest.approx(0.1 / 1.1),
    }  # fmt: skip
    assert not set(rows[0, 2:].tolist()) & {3, 7, 0} and len(set(rows[0].tolist())) == LIST
    assert set(rows[0, 2:].tolist()) <= set(range(1, 16)) and not worth[0, 2:].any()


def test_half_of_a_list_at_most_is_right_and_few_wrong_ones_repeat():
    rows, worth = lists([list(range(1, 9))], [[1, 2, 3, 19]]).draw(np.array([0]), np.random.default_rng(2))
    assert (worth[0] > 0).sum() == LIST // 2 and rows[0, LIST // 2 :].tolist() == [19] * (LIST // 2)
    all_right = lists([[1, 2, 3]], [[1, 2, 3]], rows=5)
    rows, _ = all_right.draw(np.array([0]), np.random.default_rng(3))
    assert set(rows[0, 3:].tolist()) == {4, 5}


def test_ranking_again_moves_what_was_read_alone():
    of = lists([[2]], [[5, 2, 9, 4]])
    assert of.depth == 4
    read = np.array([[0.0, 3.0, 1.0, 2.0]])
    assert of.again(read, 0.0).tolist() == [[5, 2, 9, 4]]
    assert of.again(read, 1.0).tolist() == [[2, 4, 9, 5]]
