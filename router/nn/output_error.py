"""How far a layer's output lies off with fewer experts: measured on the model, for budgets of k by layer."""

import numpy as np
import torch
from numpy.typing import NDArray

from router.context import RouteContext
from router.nn.record import layer_inputs
from router.nn.store import TrainedModel
from router.nn.threads import one_thread
from router.policies import RoutingPolicy
from router.policies.top_k import TopK
from traces.trace import RoutingTrace


def measured_output_error(reference: TrainedModel, trace: RoutingTrace) -> NDArray[np.float64]:
    """The relative error of every MoE layer at each k from 1 to the model's K: [L, K], 0 in the last column.

    ||y_k - y_K|| / ||y_K||, the mean over the tokens of `trace`, where y_k is the layer's output when a token uses only
    its k best experts, weighted as the model weights them. Tokens with y_K = 0 count as 0. What enters a layer is as
    recorded: errors of the layers before do not add to it. LExI (arXiv 2509.02753) takes random inputs and the norm
    over all of them at once. Errors: `InputError` if another model or corpus gave the trace.
    """
    x_LTD = layer_inputs(reference, trace)
    moe_layers, top_k = reference.model.moe_layers, reference.spec.top_k
    error_LK = np.zeros((len(moe_layers), top_k))
    source_rank_T = torch.zeros(trace.tokens, dtype=torch.int64)
    with one_thread():
        for layer, (moe, x_TD) in enumerate(zip(moe_layers, x_LTD, strict=True)):
            context = RouteContext(layer=layer, ranks=1, renormalise=reference.spec.renormalise)
            y_KTD = [
                moe.routed(x_TD, RoutingPolicy(selection=TopK(k=k)), context, source_rank_T, {})[0].double()
                for k in range(1, top_k + 1)
            ]
            size_T = y_KTD[-1].norm(dim=1)
            away_KT = torch.stack([(y_TD - y_KTD[-1]).norm(dim=1) for y_TD in y_KTD])
            error_KT = torch.where(size_T > 0, away_KT / torch.where(size_T > 0, size_T, 1.0), 0.0)
            error_LK[layer] = error_KT.mean(dim=1).numpy()
    return error_LK
