"""What parts cost, counted twice, and the evaluation of a model."""

import json
from dataclasses import replace

import numpy as np
import pytest

from router.elastic.evaluation import compare, differences_by_domain, evaluate, loss_by_domain
from router.elastic.extract import in_memory
from router.elastic.measure import k_curve, measured_loss, size_in_whole, size_of, step_seconds
from router.nn.evaluate import HeldOutLoss, paired_difference
from router.nn.flops import forward_flops_per_token
from router.nn.lm import LanguageModel
from router.nn.store import TrainedModel
from router.subnetwork import SubNetwork
from tests.router.tiny import SMALL
from traces.errors import InputError

PART = SubNetwork(layers_L=(0, 2), experts_LE=((0, 3, 4), (1, 2, 7)), top_k_L=(2, 1))


def test_the_size_of_a_part_by_hand(trained: TrainedModel) -> None:
    # An expert 3*32*16 = 1536; a layer without experts and router rows: projections 4*32^2 and two norms of 32 = 4160;
    # embedding, head and the last norm: 2*256*32 + 32 = 16416; a router row 32.
    size = size_of(trained.model, PART)
    assert size.parameters == 16416 + 2 * (4160 + 3 * 32) + 2 * 3 * 1536 == 34144
    assert size.active_parameters == 16416 + 2 * (4160 + 3 * 32) + 3 * 1536 == 29536
    assert size.weight_bytes == 4 * 34144
    whole = 16416 + 3 * (4160 + 8 * 32) + 3 * 8 * 1536
    assert size.total_share == 34144 / whole
    assert size.active_share == 29536 / (whole - 3 * 6 * 1536)
    assert size.activation == 3 / (3 * 8)


@pytest.mark.parametrize(
    "changes",
    [{}, {"gate": "sigmoid", "shared_experts": 1}, {"renormalise": False}],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_the_size_is_that_of_the_model_cut_out(changes: dict[str, object]) -> None:
    model = LanguageModel(replace(SMALL, **changes))  # type: ignore[arg-type]  # of any field
    cut, size = model.extract(PART), size_of(model, PART)
    assert size.parameters == sum(weight.numel() for weight in cut.parameters())
    assert size.flops_per_token == forward_flops_per_token(cut.config)
    assert size.flops_share == size.flops_per_token / forward_flops_per_token(model.config)


def test_a_part_knows_its_share_of_a_whole_that_is_not_there(trained: TrainedModel) -> None:
    cut = in_memory(trained, PART)
    assert size_in_whole(cut) == size_of(trained.model, PART)
    assert size_in_whole(trained) == size_of(trained.model, trained.model.config.whole)
    assert size_in_whole(trained).total_share == 1


def test_steps_are_timed_in_rounds(trained: TrainedModel) -> None:
    seconds_RJ = step_seconds(trained.model, trained.corpus, (PART, SMALL.whole), rounds=3)
    assert seconds_RJ.shape == (3, 2)
    assert (seconds_RJ > 0).all()


def test_an_evaluation_says_what_its_parts_say(trained: TrainedModel) -> None:
    cut = in_memory(trained, PART)
    found = evaluate(cut, top_ks=(1, 3), rounds=2, sequences=16)
    assert (found.part, found.of_layers, found.of_experts) == (PART, 3, 8)
    assert found.loss.mean == measured_loss(cut.model, cut.corpus, cut.model.config.whole, sequences=16).mean
    for point, loss in zip(found.curve, k_curve(cut.model, cut.corpus, (1, 3), sequences=16), strict=True):
        assert point.loss == loss.mean
        assert (point.difference, *point.difference_ci) == paired_difference(loss, found.loss)
    low, high = found.step_s[1:]
    assert low <= found.step_s[0] <= high
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["size"]["parameters"] == 34144
    assert set(document["loss"]) == {*trained.corpus.domains, "all"}


def test_the_curve_stops_where_experts_do(trained: TrainedModel) -> None:
    cut = in_memory(trained, PART)
    assert [point.top_k for point in evaluate(cut, rounds=1, sequences=16).curve] == [1, 2]
    for top_k in (0, 4):
        with pytest.raises(InputError, match=f"top k of the curve is {top_k}; the model has experts for 1 to 3"):
            evaluate(cut, top_ks=(top_k,), rounds=1)


def losses(rows: list[float], domain_N: list[int]) -> HeldOutLoss:
    nothing_LE = np.zeros((1, 1), dtype=np.int64)
    return HeldOutLoss(
        domains=("code", "legal"),
        loss_N=np.array(rows),
        domain_N=np.array(domain_N, dtype=np.uint8),
        chosen_LE=nothing_LE,
        kept_LE=nothing_LE,
        rerouted_LE=nothing_LE,
        tokens=1,
    )


def test_losses_by_domain_by_hand() -> None:
    loss = losses([1.0, 5.0, 3.0, 5.0], [0, 1, 0, 1])
    # Code 1 and 3: mean 2, deviation √2, over √2 is 1. Legal 5 and 5: no deviation. All: half of either.
    assert loss_by_domain(loss) == {"code": (2.0, pytest.approx(1.0)), "legal": (5.0, 0.0), "all": (3.5, 0.5)}
    more = losses([1.5, 6.0, 3.5, 6.0], [0, 1, 0, 1])
    assert differences_by_domain(more, loss)["code"] == (0.5, 0.5, 0.5)
    assert differences_by_domain(more, loss)["legal"] == (1.0, 1.0, 1.0)
    assert differences_by_domain(more, loss)["all"][0] == 0.75


def test_a_comparison_is_paired_with_what_was_cut(trained: TrainedModel) -> None:
    cut = in_memory(trained, PART)
    found = compare(trained, cut, sequences=16)
    assert found.size_before.total_share == 1
    assert found.size_after == size_of(trained.model, PART)
    assert found.differences["all"] == paired_difference(found.loss_after, found.loss_before)
    document = found.to_json()["loss"]["code"]
    assert document["difference"] == pytest.approx(document["after"] - document["before"])
    whole = compare(trained, in_memory(trained, trained.model.config.whole), sequences=16)
    assert whole.differences["all"] == (0.0, 0.0, 0.0)


def test_the_size_of_a_part_with_null_experts_hangs_on_the_text() -> None:
    model = LanguageModel(replace(SMALL, null_experts=2))
    with pytest.raises(InputError, match="null experts"):
        size_of(model, model.config.whole)
