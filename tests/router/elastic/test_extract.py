"""Choosing a part, and keeping it as a model of its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st

from router.elastic.extract import choose_part, extract, in_memory, keep_experts, keep_layers, part_key
from router.elastic.importance import SCORES, Score, expert_importance, importance_text
from router.nn.record import record
from router.nn.store import TrainedModel, held_out, load_model
from router.subnetwork import SubNetwork
from traces.errors import InputError

TEXT_BS = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(1))
PART = SubNetwork(layers_L=(0, 2), experts_LE=((0, 3, 4), (1, 2, 7)), top_k_L=(2, 1))


@pytest.mark.parametrize(
    ("sizes", "described"),
    [
        ({}, "3 layers of 8 experts, k 2"),
        ({"depth": 2}, "2 layers of 8 experts, k 2"),
        ({"experts": 4}, "3 layers of 4 experts, k 2"),
        ({"top_k": 1}, "3 layers of 8 experts, k 1"),
        ({"depth": 2, "experts": 4, "top_k": (3, 1)}, "2 layers of 4 experts, k 3/1"),
        ({"layers": (0, 2), "experts": 5}, "2 layers of 5 experts, k 2"),
    ],
)
def test_sizes_come_out_as_asked(trained: TrainedModel, sizes: dict[str, Any], described: str) -> None:
    part = choose_part(trained.model, trained.corpus, **sizes)
    assert part.describe() == described
    assert part.layers_L == sizes.get("layers", part.layers_L)


def test_shallower_parts_lie_inside_deeper_ones(trained: TrainedModel) -> None:
    kept = [set(keep_layers(trained.model, trained.corpus, depth).layers_L) for depth in (3, 2, 1)]
    assert kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize("by", SCORES)
def test_the_experts_of_the_highest_score_stay(trained: TrainedModel, by: Score) -> None:
    model, corpus = trained.model, trained.corpus
    part = choose_part(model, corpus, experts=3, by=by, domain="code")
    text_BS = importance_text(corpus, model.config.context, "code")
    score_LE = expert_importance(model, text_BS, model.config.whole).score_LE(by)
    for score_E, kept_E in zip(score_LE, part.experts_LE, strict=True):
        assert min(score_E[list(kept_E)]) >= max(np.delete(score_E, kept_E))


@given(score_LE=numpy_st.arrays(np.float64, (2, 6), elements=st.integers(0, 3).map(float)), experts=st.integers(1, 6))
def test_kept_experts_are_never_worse_and_fewer_lie_inside_more(
    score_LE: np.ndarray[tuple[int, int], np.dtype[np.float64]], experts: int
) -> None:
    part = SubNetwork.whole(2, 6, 1)
    kept = keep_experts(part, score_LE, experts)
    for score_E, kept_E, fewer_E in zip(
        score_LE, kept.experts_LE, keep_experts(part, score_LE, max(experts - 1, 1)).experts_LE, strict=True
    ):
        assert len(kept_E) == experts
        assert set(fewer_E) <= set(kept_E)
        gone_E = np.delete(score_E, kept_E)
        assert gone_E.size == 0 or score_E[list(kept_E)].min() >= gone_E.max()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"depth": 4}, "depth is 4; the model has 3: use 1 to 3"),
        ({"depth": 0}, "depth is 0"),
        ({"experts": 9}, "experts is 9; the model has 8: use 1 to 8"),
        ({"experts": 1}, "of 1 experts cannot give a token 2; keep more experts or use a smaller top_k"),
        ({"depth": 2, "top_k": (2, 1, 1)}, "3 layers have top_k, and 2 are kept"),
        ({"layers": (0, 3)}, "keeps layer 3; the model has 3, from 0"),
        ({"layers": (0, 1), "depth": 1}, r"depth 1 and layers \[0, 1\] are both given"),
        ({"domain": "poems"}, "no domain 'poems'"),
    ],
)
def test_what_the_model_has_not_is_refused(trained: TrainedModel, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_part(trained.model, trained.corpus, **sizes)


def test_a_part_is_written_and_read_as_a_model_of_its_own(trained: TrainedModel, tmp_path: Path) -> None:
    cut = extract(trained, PART, tmp_path / "part")
    read = load_model(tmp_path / "part")
    inside = trained.model.routed(TEXT_BS, PART.policy, part=PART).logits_BSV
    for one in (cut, read):
        alone = one.model.routed(TEXT_BS, one.model.config.policy).logits_BSV
        torch.testing.assert_close(alone, inside, atol=1e-5, rtol=1e-5)
        assert one.part == PART
        assert one.whole_config == trained.model.config
        assert (one.key, one.spec.experts, one.spec.layers) == (part_key(trained, PART), 3, 2)
    assert read.info == cut.info
    assert read.info["of"]["key"] == trained.key
    assert read.info["held_out"] == pytest.approx(held_out(read.model, read.corpus))
    assert (trained.part, trained.whole_config) == (trained.model.config.whole, trained.model.config)


def test_cutting_twice_is_cutting_once(trained: TrainedModel, tmp_path: Path) -> None:
    first = extract(trained, PART, tmp_path / "first")
    inner = SubNetwork(layers_L=(1,), experts_LE=((0, 2),), top_k_L=(1,))
    twice = extract(load_model(first.path), inner, tmp_path / "twice")
    at_once = SubNetwork(layers_L=(2,), experts_LE=((1, 7),), top_k_L=(1,))
    assert twice.part == at_once
    assert twice.key == part_key(trained, at_once)
    assert twice.info["of"] == first.info["of"]
    torch.testing.assert_close(
        twice.model.routed(TEXT_BS, at_once.policy).logits_BSV,
        trained.model.routed(TEXT_BS, at_once.policy, part=at_once).logits_BSV,
        atol=1e-5,
        rtol=1e-5,
    )
    with pytest.raises(InputError, match="keeps expert 7; the model has 3"):
        extract(first, SubNetwork(layers_L=(0,), experts_LE=((7,),), top_k_L=(1,)), tmp_path / "none")


def test_a_part_does_not_replace_another_model(trained: TrainedModel, tmp_path: Path) -> None:
    extract(trained, PART, tmp_path)
    extract(trained, PART, tmp_path)  # the same again changes nothing
    other = SubNetwork(layers_L=(0,), experts_LE=((0, 1),), top_k_L=(1,))
    with pytest.raises(InputError, match="holds another model"):
        extract(trained, other, tmp_path)
    with pytest.raises(InputError, match="holds another model"):
        extract(trained, PART, trained.path)
    assert load_model(tmp_path).part == PART


def test_a_part_is_recorded_under_its_own_key(trained: TrainedModel) -> None:
    trace = record(in_memory(trained, PART), tokens=4 * 32, seed=0)
    assert (trace.model.layers, trace.model.experts, trace.candidates) == (2, 3, 3)
    assert trace.text["model"] == part_key(trained, PART) != trained.key
    assert part_key(trained, PART) in trace.source
