from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from router.candidates import Candidates
from router.context import RouteContext
from router.nn.record import layer_inputs, record
from router.nn.store import TrainedModel, reference_model
from tests.router.tiny import SHORT
from traces.capture import RouterCapture
from traces.errors import InputError
from traces.trace import PREFILL, RoutingTrace


@pytest.fixture(scope="module")
def trace(reference: TrainedModel) -> RoutingTrace:
    return record(reference, tokens=20 * reference.model.config.context, seed=5)


def test_a_trace_has_every_candidate_best_first(reference: TrainedModel, trace: RoutingTrace) -> None:
    assert trace.candidates == trace.model.experts == 8
    assert trace.gates_TLC is not None
    assert bool((np.diff(trace.gates_TLC.astype(np.float32), axis=-1) <= 0).all())
    np.testing.assert_allclose(trace.gates_TLC.astype(np.float32).sum(axis=-1), 1, atol=4e-3)
    assert trace.domains == reference.corpus.domains
    assert set(trace.phase_T.tolist()) == {PREFILL}
    assert trace.domain_T is not None
    for first in range(0, trace.tokens - 4 * 32, 32):
        assert len(set(trace.domain_T[first : first + 4 * 32].tolist())) == len(trace.domains)


def test_recording_again_gives_the_same_trace(reference: TrainedModel, trace: RoutingTrace) -> None:
    same = record(reference, tokens=trace.tokens, seed=5)
    assert np.array_equal(same.expert_ids_TLC, trace.expert_ids_TLC)
    assert same.text == trace.text


@torch.no_grad()
def test_layer_inputs_and_gate_give_back_the_recorded_ids(reference: TrainedModel, trace: RoutingTrace) -> None:
    inputs_LTD = layer_inputs(reference, trace)
    for layer, moe in enumerate(reference.model.moe_layers):
        # A gate over all tokens at once may differ in the last bit from one over a step of them.
        logits_TE = torch.cat([moe.gate(part) for part in torch.split(inputs_LTD[layer], 16 * 32)])
        candidates = Candidates.from_logits(logits_TE, torch.zeros(trace.tokens, dtype=torch.int64))
        assert np.array_equal(candidates.ids_TC.numpy(), trace.expert_ids_TLC[:, layer])


@torch.no_grad()
def test_a_model_with_other_gates_and_null_experts_is_recorded_as_it_routes(reference: TrainedModel) -> None:
    config = replace(reference.model.config, gate="sigmoid", top_k=3, null_experts=2, null_kind="copy")
    other = reference_model(config=config, hyper=SHORT)
    trace = record(other, tokens=4 * config.context, seed=5)
    assert (trace.candidates, trace.score_kind, trace.model.null_experts) == (10, "sigmoid", 2)
    assert trace.gates_TLC is not None
    assert not np.allclose(trace.gates_TLC.astype(np.float32).sum(axis=-1), 1, atol=0.1)
    inputs_LTD = layer_inputs(other, trace)
    used_LE = np.zeros((config.layers, config.experts), dtype=np.int64)
    for layer, moe in enumerate(other.model.moe_layers):
        candidates = moe.candidates(moe.gate(inputs_LTD[layer]), torch.zeros(trace.tokens, dtype=torch.int64))
        assert np.array_equal(candidates.ids_TC.numpy(), trace.expert_ids_TLC[:, layer])
        context = RouteContext(layer=layer, ranks=1, renormalise=config.renormalise)
        assignment, _ = config.policy.route(candidates, context, {})
        used_LE[layer] = torch.bincount(assignment.ids_TK[assignment.kept_TK], minlength=config.experts).numpy()
    assert np.array_equal(trace.loads_LE(), used_LE)
    assert used_LE.sum() < 3 * trace.tokens * config.layers  # some choices were null experts


def test_layer_inputs_of_a_part_are_a_part_of_the_layer_inputs(reference: TrainedModel, trace: RoutingTrace) -> None:
    some = np.arange(7, trace.tokens, 11)
    assert torch.equal(layer_inputs(reference, trace.take(some)), layer_inputs(reference, trace)[:, some])


def test_a_trace_of_another_model_is_refused(reference: TrainedModel, trace: RoutingTrace) -> None:
    for field in ("model", "corpus"):
        with pytest.raises(InputError, match=f"its {field} is other"):
            layer_inputs(reference, replace(trace, text={**trace.text, field: "other"}))


def test_tokens_that_do_not_fill_sequences_are_refused(reference: TrainedModel) -> None:
    with pytest.raises(InputError, match="use 64"):
        record(reference, tokens=70, seed=0)


class TupleRouter(nn.Module):
    """A gate as newer Hugging Face models write it: logits first, then what it chose."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4, 3))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden_states.reshape(-1, 3) @ self.weight.T
        return logits, logits.argmax(dim=-1)


def test_capture_takes_plain_and_tuple_routers() -> None:
    plain, of_tuple = nn.Linear(3, 4, bias=False, dtype=torch.bfloat16), TupleRouter()
    x_BSD = torch.arange(12.0).view(2, 2, 3)
    with RouterCapture([plain, of_tuple], keep_hidden=True) as capture:
        for _ in range(2):
            plain(x_BSD.bfloat16())
            of_tuple(hidden_states=x_BSD)
    plain(x_BSD.bfloat16())  # closed: not recorded
    assert capture.logits_LTE().shape == (2, 8, 4)
    assert capture.hidden_LTD()[1, :4].tolist() == x_BSD.reshape(4, 3).tolist()
    assert capture.logits_LTE()[1, 5].tolist() == [3.0, 4.0, 5.0, 0.0]


def test_capture_refuses_what_is_no_router() -> None:
    with RouterCapture([nn.Identity()]) as capture, pytest.raises(InputError, match="not logits"):
        capture.routers[0](torch.arange(4))
    with pytest.raises(InputError, match="the same tokens"):
        capture.logits_LTE()
    with pytest.raises(InputError, match="no routers"):
        RouterCapture([])
