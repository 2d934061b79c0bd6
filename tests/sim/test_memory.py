"""What a rank must hold, by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from router.placement.base import Placement
from sim.layout import Layout
from sim.memory import MemoryUse, memory_use
from traces.model import ModelSpec

# A row is 8 * 2 = 16 bytes, an expert 3 * 8 * 16 = 384 parameters of 2 bytes. Outside the experts there are 1000
# parameters, 400 of them in attention, and a shared expert of 3 * 8 * 4 = 96.
MODEL = ModelSpec(
    name="tiny",
    layers=1,
    experts=4,
    top_k=2,
    hidden=8,
    expert_hidden=16,
    shared_experts=1,
    shared_hidden=4,
    other_parameters=1000,
    attention_parameters=400,
    kv_bytes_per_token=10,
    attention="grouped",
    heads=8,
    kv_heads=2,
    head_dim=1,
    vocab=10,
)
# Rank 0 holds experts 0 and 1, rank 1 holds 2 and 3.
PLACEMENT = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3]]), experts=4, ranks=2)


def use(model: ModelSpec = MODEL, placement: Placement = PLACEMENT, *, layout: Any = None, **options: Any) -> MemoryUse:
    defaults: dict[str, Any] = {
        "tokens_per_rank": 2,
        "width": 2,
        "kv_tokens_per_rank": 0,
        "protocol": "per_rank",
        "dispatch_dtype": "bfloat16",
        "capacity_bytes": None,
    }
    return memory_use(model, placement, layout or Layout.one_node(2), **{**defaults, **options})


def ranks_of(ranks: int, **options: int) -> Layout:
    return Layout(node_of_G=np.zeros(ranks, dtype=np.int64), **options)


def test_the_rest_of_the_model_stands_once_on_every_rank() -> None:
    """4-bit models keep it in bfloat16, 8-bit ones do not."""
    four_bit = replace(MODEL, weight_bytes=0.5)
    found = use(four_bit, capacity_bytes=2800)
    assert found.expert_bytes == 2 * 384 * 0.5
    assert found.other_weight_bytes == (1000 + 96) * 2
    assert found.buffer_bytes == 2 * 2 * 2 * 16  # 2 tokens a rank, 2 experts each, sent and received
    assert found.total_bytes == 384 + 2192 + 128 == 2704
    assert found.fits
    assert not use(four_bit, capacity_bytes=2703).fits
    assert use(four_bit, capacity_bytes=2704).fits
    assert use(replace(MODEL, weight_bytes=1.0)).other_weight_bytes == 1096


def test_redundant_slots_cost_what_their_experts_weigh() -> None:
    more = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3, 0, 1]]), experts=4, ranks=2)
    assert use(placement=more).expert_bytes == 3 / 2 * use().expert_bytes == 3 * 384 * 2


def test_low_latency_buffers_have_room_for_every_token_at_every_expert() -> None:
    """Any of the 2 ranks may send its 2 tokens to each of a rank's 2 slots: 8 rows, two buffers, out and back.

    16 rows, of 8 bytes and a scale of 4 for 128 in FP8, and of 16 bytes on the way back.
    """
    found = use(protocol="per_expert", dispatch_dtype="fp8")
    assert found.buffer_bytes == 2 * (2 * 2 * 2) * (8 * (1 + 4 / 128) + 16)
    assert use(protocol="per_expert").buffer_bytes == 2 * (2 * 2 * 2) * (16 + 16)
    # DeepSeek-V3 with 128 tokens on each of 64 ranks: 1.42 GB. A row is 7392 bytes in FP8 and 14336 in BF16.
    deepseek = replace(MODEL, hidden=7168, experts=256)
    slots = Placement(slot_to_expert_LS=np.arange(256)[None], experts=256, ranks=64)
    found = use(
        deepseek, slots, layout=ranks_of(64), protocol="per_expert", dispatch_dtype="fp8", tokens_per_rank=128, width=8
    )
    assert found.buffer_bytes == 2 * (4 * 64 * 128) * (7392 + 14336)


@pytest.mark.parametrize(("kv_dtype", "bytes_"), [("bfloat16", 10), ("fp8", 5)])
def test_the_cache_holds_all_tokens_in_its_dtype(kv_dtype: str, bytes_: float) -> None:
    assert use(kv_tokens_per_rank=7, kv_dtype=kv_dtype).kv_cache_bytes == 7 * bytes_


def test_ranks_that_share_heads_share_attentions_weights_and_grouped_keys() -> None:
    # 600 parameters beside attention, 96 of the shared expert, a half of attention's 400.
    two = use(layout=ranks_of(2, attention_tensor=2), kv_tokens_per_rank=7)
    assert two.other_weight_bytes == (600 + 96 + 200) * 2
    assert two.kv_cache_bytes == 7 * 10 / 2
    # Only 2 key-value heads: a third and fourth rank hold copies.
    placement = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3]]), experts=4, ranks=4)
    four = use(placement=placement, layout=ranks_of(4, attention_tensor=4), kv_tokens_per_rank=7)
    assert four.other_weight_bytes == (600 + 96 + 100) * 2
    assert four.kv_cache_bytes == 7 * 10 / 2


def test_a_latent_cache_cannot_be_shared() -> None:
    latent = replace(MODEL, attention="latent", kv_heads=0)
    assert use(latent, layout=ranks_of(2, attention_tensor=2), kv_tokens_per_rank=7).kv_cache_bytes == 70


def test_ranks_that_share_an_expert_hold_a_part_of_it_each() -> None:
    one_group = Placement(slot_to_expert_LS=np.array([[0, 1, 2, 3]]), experts=4, ranks=1)
    found = use(placement=one_group, layout=ranks_of(2, expert_tensor=2))
    assert found.expert_bytes == 4 * 384 * 2 / 2
