import numpy as np
import pytest
import torch

from router.candidates import Candidates
from router.history import RoutingHistory
from router.nn.output_error import measured_output_error
from router.nn.record import layer_inputs, record
from router.nn.store import TrainedModel
from traces.errors import InputError
from traces.trace import RoutingTrace


@pytest.fixture(scope="module")
def trace(reference: TrainedModel) -> RoutingTrace:
    return record(reference, tokens=4 * reference.model.config.context, seed=9)


@torch.no_grad()
def test_the_error_of_one_expert_is_that_of_its_output_alone(reference: TrainedModel, trace: RoutingTrace) -> None:
    """Against each expert's own formula: with k = 1 a token's best expert weighs 1."""
    error_LK = measured_output_error(reference, trace)
    assert error_LK.shape == (2, 2)
    assert (error_LK[:, -1] == 0).all()
    for layer, (moe, x_TD) in enumerate(zip(reference.model.moe_layers, layer_inputs(reference, trace), strict=True)):
        candidates = Candidates.from_logits(moe.gate(x_TD), torch.zeros(trace.tokens, dtype=torch.int64))
        best_T2, ids_T2 = candidates.probs_TC[:, :2], candidates.ids_TC[:, :2]
        gate_T2F, up_T2F = (
            torch.einsum("td,tefd->tef", x_TD, weight_EFD[ids_T2]) for weight_EFD in (moe.w_gate_EFD, moe.w_up_EFD)
        )
        inner_T2F = torch.nn.functional.silu(gate_T2F) * up_T2F
        y_T2D = torch.einsum("tef,tedf->ted", inner_T2F, moe.w_down_EDF[ids_T2])
        full_TD = (y_T2D * (best_T2 / best_T2.sum(dim=1, keepdim=True))[:, :, None]).sum(dim=1)
        error_T = (y_T2D[:, 0] - full_TD).norm(dim=1) / full_TD.norm(dim=1)
        assert error_LK[layer, 0] == pytest.approx(error_T.mean().item(), rel=1e-4)


def test_measured_errors_fit_the_history_of_the_same_trace(reference: TrainedModel, trace: RoutingTrace) -> None:
    error_LK = measured_output_error(reference, trace)
    history = RoutingHistory.of(trace).with_output_error(error_LK)
    assert history.measured
    assert np.isfinite(error_LK).all()
    assert (error_LK[:, 0] > 0).all()


def test_a_trace_of_another_model_is_refused(reference: TrainedModel, trace: RoutingTrace) -> None:
    trace.text["model"], own = "another", trace.text["model"]
    try:
        with pytest.raises(InputError, match=r"its model is another, the reference model's is"):
            measured_output_error(reference, trace)
    finally:
        trace.text["model"] = own
