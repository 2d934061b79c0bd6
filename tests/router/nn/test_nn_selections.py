"""Every selection in the real layer: what the layer computes is what its assignment says, step after step."""

from typing import Any

import numpy as np
import pytest
import torch

from router.context import RouteContext, State
from router.history import RoutingHistory
from router.nn.moe import MoELayer
from router.policies import SELECTIONS, RoutingPolicy, make_selection

EXPERTS = 8
PARAMETERS: dict[str, dict[str, Any]] = {
    "top_k": {"k": 3},
    "top_k_by_layer": {"mean_k": 2.0, "k_max": 3},
    "top_p": {"p": 0.4, "k_max": 4},
    "held_top_p": {"target": 2.5, "k_max": 4},
    "skip": {"threshold": 0.5, "k_max": 4},
    "skip_by_ratio": {"quantile": 0.5, "k_max": 4},
    "null_experts": {"k": 3},
    "balance_bias": {"k": 3, "rate": 0.01},
    "group_limited": {"k": 3, "groups": 4, "kept_groups": 2},
    "expert_choice": {"factor": 1.0, "k_max": 4, "mode": "batch"},
    "partners": {"k": 3, "partners": 3},
}


def test_every_selection_is_here() -> None:
    assert set(PARAMETERS) == set(SELECTIONS)


@pytest.mark.parametrize("name", list(PARAMETERS))
@torch.no_grad()
def test_a_layer_computes_what_is_selected(name: str) -> None:
    torch.manual_seed(5)
    nulls = 4 if name == "null_experts" else 0
    layer = MoELayer(hidden=16, expert_hidden=8, experts=EXPERTS, null_experts=nulls)
    policy = RoutingPolicy(selection=make_selection(name, PARAMETERS[name]))
    away_E = np.arange(EXPERTS)
    history = RoutingHistory(
        together_LEE=(EXPERTS - abs(away_E[:, None] - away_E))[None],
        ratio_LQ=np.linspace(0.2, 1, 101)[None],
        output_error_LK=np.array([[0.5, 0.2, 0.0]]),
    )
    context = RouteContext(layer=0, ranks=1, renormalise=True, history=history)
    state: State = {}
    unserved = 0
    for _ in range(3):
        x_TD = torch.randn(24, 16)
        out_TD, assignment, state = layer.routed(x_TD, policy, context, torch.zeros(24, dtype=torch.int64), state)
        gate_TEF = torch.einsum("td,efd->tef", x_TD, layer.w_gate_EFD)
        up_TEF = torch.einsum("td,efd->tef", x_TD, layer.w_up_EFD)
        all_TED = torch.einsum("tef,edf->ted", torch.nn.functional.silu(gate_TEF) * up_TEF, layer.w_down_EDF)
        row_T1 = torch.arange(24)[:, None]
        chosen_TKD = all_TED[row_T1, assignment.ids_TK.clamp(min=0)] * assignment.weights_TK[:, :, None]
        torch.testing.assert_close(out_TD, chosen_TKD.sum(dim=1), atol=1e-5, rtol=1e-5)
        unserved_T = ~assignment.chosen_TK.any(dim=1)
        assert (out_TD[unserved_T] == 0).all()
        unserved += int(unserved_T.sum())
    assert (unserved > 0) == (name in ("expert_choice", "null_experts"))
