"""The mixture-of-experts layer: one set of weights, a padded path to train it and a policy's path to run it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn

from cost_models.microbench.experts import expert_mlp
from router.assignment import Assignment
from router.candidates import Candidates
from router.capacity import Capacity
from router.context import RouteContext, State
from router.policies import RoutingPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRule:
    """How the layer routes while it trains.

    Each expert takes at most ceil(T * K / E * `capacity_factor`) pairs of a step, first choices first: 1.5 drops few
    and pads far less than the fullest expert would. `balance` is the factor on the load-balancing loss.
    """

    top_k: int
    capacity_factor: float = 1.5
    balance: float = 0.01


class MoELayer(nn.Module):
    """E SwiGLU experts behind a softmax gate.

    `gate` maps [T, D] to logits [T, E]; expert e computes down(silu(gate x) * up x) with `w_gate_EFD[e]`,
    `w_up_EFD[e]` and `w_down_EDF[e]`. The weights of a token's experts are scaled to sum to one.
    """

    def __init__(self, *, hidden: int, expert_hidden: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.w_gate_EFD = nn.Parameter(torch.randn(experts, expert_hidden, hidden) * hidden**-0.5)
        self.w_up_EFD = nn.Parameter(torch.randn(experts, expert_hidden, hidden) * hidden**-0.5)
        self.w_down_EDF = nn.Parameter(torch.randn(experts, hidden, expert_hidden) * expert_hidden**-0.5)

    @property
    def experts(self) -> int:
        """E."""
        return int(self.gate.out_features)

    def forward(self, x_TD: Tensor, rule: TrainingRule) -> tuple[Tensor, Tensor]:
        """The training path: (output [T, D], balance loss, a scalar).

        Pairs over an expert's capacity are dropped. The loss is that of Switch (arXiv 2101.03961) over k choices:
        balance * E * sum of f_e P_e, with f_e expert e's share of the pairs and P_e its mean probability.
        """
        tokens, k, experts = x_TD.shape[0], rule.top_k, self.experts
        with torch.autocast(x_TD.device.type, enabled=False):
            probs_TE = torch.softmax(self.gate(x_TD.float()), dim=-1)
        best_TK, ids_TK = torch.topk(probs_TE, k)
        weights_TK = best_TK / best_TK.sum(dim=-1, keepdim=True)

        # Every token's first choice queues before any second choice.
        pair_KT = F.one_hot(ids_TK.T.reshape(-1), experts)
        place_N = (pair_KT.cumsum(dim=0) * pair_KT).sum(dim=-1) - 1
        place_TK = place_N.view(k, tokens).T
        capacity = Capacity(factor=rule.capacity_factor).pairs_per_expert(tokens, k, experts)
        kept_TK = place_TK < capacity
        row_TK = torch.where(kept_TK, ids_TK * capacity + place_TK, experts * capacity)

        # Rows no pair fills read token 0; nothing reads their output. The row behind the last takes dropped pairs.
        token_of_row = torch.zeros(experts * capacity + 1, dtype=torch.int64, device=x_TD.device)
        token_TK = torch.arange(tokens, device=x_TD.device)[:, None].expand(tokens, k)
        token_of_row[row_TK.reshape(-1)] = token_TK.reshape(-1)
        if torch.is_autocast_enabled(x_TD.device.type):
            # Before they are gathered, so that fewer bytes are.
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        rows_ECD = x_TD.index_select(0, token_of_row[:-1]).view(experts, capacity, -1)
        w_in_E2FD = torch.cat((self.w_gate_EFD, self.w_up_EFD), dim=1)
        gate_ECF, up_ECF = torch.bmm(rows_ECD, w_in_E2FD.mT).chunk(2, dim=-1)
        inner_ECF = F.silu(gate_ECF) * up_ECF
        out_ND = torch.bmm(inner_ECF, self.w_down_EDF.mT).flatten(0, 1)
        read_TK = torch.where(kept_TK, row_TK, 0)
        pairs_TKD = out_ND.index_select(0, read_TK.reshape(-1)).view(tokens, k, -1)
        out_TD = (pairs_TKD * (weights_TK * kept_TK)[:, :, None].to(pairs_TKD.dtype)).sum(dim=1)

        share_E = pair_KT.sum(dim=0) / (tokens * k)
        return out_TD, rule.balance * experts * (share_E * probs_TE.mean(dim=0)).sum()

    @torch.no_grad()
    def routed(
        self, x_TD: Tensor, policy: RoutingPolicy, context: RouteContext, source_rank_T: Tensor, state: State
    ) -> tuple[Tensor, Assignment, State]:
        """The path of a deployment: what `policy` keeps of x_TD [T, D] is computed, and nothing else.

        Returns the output [T, D] (zero for a token all of whose pairs were dropped), the assignment, and the
        policy's next state.
        """
        candidates = Candidates.from_logits(self.gate(x_TD), source_rank_T)
        assignment, state = policy.route(candidates, context, state)
        expert_N, order_N = torch.sort(assignment.ids_TK[assignment.kept_TK], stable=True)
        token_N = assignment.kept_TK.nonzero()[:, 0][order_N]
        weight_N = assignment.weights_TK[assignment.kept_TK][order_N]
        counts_E = torch.bincount(expert_N, minlength=self.experts).tolist()
        out_ND = expert_mlp(x_TD[token_N], counts_E, self.w_gate_EFD, self.w_up_EFD, self.w_down_EDF)
        out_TD = torch.zeros_like(x_TD).index_add_(0, token_N, out_ND * weight_N[:, None])
        return out_TD, assignment, state
