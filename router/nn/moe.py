"""The mixture-of-experts layer: one set of weights, a padded path to train it and a policy's path to run it."""

import math
from collections.abc import Sequence
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
from traces.model import GateKind, NullKind

_NULL_KINDS: tuple[NullKind, ...] = ("zero", "copy", "constant")
_CONSTANT_SIZE = 0.02  # of a constant expert's vector at the start, as of an embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRule:
    """How the layer routes while it trains.

    Each expert takes at most ceil(T * K / E * `capacity_factor`) pairs of a step, first choices first: 1.5 drops few
    and pads far less than the fullest expert would. E counts null experts too. `balance` is the factor on the
    load-balancing loss, `ranking` that on the router's entropy. `experts`: only these are there, ids ascending (None:
    all). `pool`: a token's `top_k` experts are drawn evenly from its best `pool` ones (None: they are the best).
    """

    top_k: int
    capacity_factor: float = 1.5
    balance: float = 0.01
    ranking: float = 0.0
    experts: tuple[int, ...] | None = None
    pool: int | None = None


class SharedExperts(nn.Module):
    """S experts that every token uses, at weight one: a single SwiGLU of width S * F, which computes their sum."""

    def __init__(self, *, hidden: int, expert_hidden: int, experts: int) -> None:
        super().__init__()
        width = experts * expert_hidden
        self.w_gate_FD = nn.Parameter(torch.randn(width, hidden) * hidden**-0.5)
        self.w_up_FD = nn.Parameter(torch.randn(width, hidden) * hidden**-0.5)
        self.w_down_DF = nn.Parameter(torch.randn(hidden, width) * expert_hidden**-0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        return F.linear(F.silu(F.linear(x_TD, self.w_gate_FD)) * F.linear(x_TD, self.w_up_FD), self.w_down_DF)


class NullExperts(nn.Module):
    """N experts that do next to no work: `zero` gives nothing, `copy` the token itself, `constant` a mix.

    A constant expert gives a x + b v: a vector v of its own, and the token's mix (a, b) = softmax(W x), W [2, D]
    (MoE++, arXiv 2410.07348). `mixed`: the three kinds in turn. Zero experts are AdaMoE's (arXiv 2406.13233).
    """

    w_mix_X2D: nn.Parameter | None
    constant_XD: nn.Parameter | None

    def __init__(self, *, hidden: int, experts: int, kind: NullKind) -> None:
        super().__init__()
        kinds = [_NULL_KINDS[null % 3] if kind == "mixed" else kind for null in range(experts)]
        self.copies = [null for null, its_kind in enumerate(kinds) if its_kind == "copy"]
        self.constants = [null for null, its_kind in enumerate(kinds) if its_kind == "constant"]
        self.w_mix_X2D = self.constant_XD = None
        if self.constants:
            self.w_mix_X2D = nn.Parameter(torch.randn(len(self.constants), 2, hidden) * hidden**-0.5)
            self.constant_XD = nn.Parameter(torch.randn(len(self.constants), hidden) * _CONSTANT_SIZE)

    def forward(self, x_TD: Tensor, weights_TN: Tensor) -> Tensor:
        """What tokens [T, D] get from the null experts that they give `weights_TN` to: [T, D]."""
        own_T1 = weights_TN[:, self.copies].sum(dim=1, keepdim=True)
        if self.w_mix_X2D is None or self.constant_XD is None:
            return x_TD * own_T1.to(x_TD.dtype)
        mix_TX2 = torch.softmax(torch.einsum("td,xcd->txc", x_TD, self.w_mix_X2D), dim=-1)
        given_TX2 = weights_TN[:, self.constants, None] * mix_TX2
        own_T1 = own_T1 + given_TX2[:, :, 0].sum(dim=1, keepdim=True)
        return x_TD * own_T1.to(x_TD.dtype) + given_TX2[:, :, 1].to(x_TD.dtype) @ self.constant_XD.to(x_TD.dtype)


class MoELayer(nn.Module):
    """E SwiGLU experts behind a gate, and what else a layer may have.

    `gate` maps [T, D] to logits [T, E + N], of which `gate_kind` makes scores; expert e computes
    down(silu(gate x) * up x) with `w_gate_EFD[e]`, `w_up_EFD[e]` and `w_down_EDF[e]`. If `renormalise`, the weights of
    a token's experts are scaled to sum to one, else they are the scores. `shared` and `null` are None where the layer
    has none; what a token gives to null experts is their score, and takes no part in the scaling (AdaMoE, arXiv
    2406.13233).
    """

    def __init__(
        self,
        *,
        hidden: int,
        expert_hidden: int,
        experts: int,
        gate_kind: GateKind = "softmax",
        renormalise: bool = True,
        shared_experts: int = 0,
        null_experts: int = 0,
        null_kind: NullKind = "zero",
    ) -> None:
        super().__init__()
        self.gate_kind = gate_kind
        self.renormalise = renormalise
        self.null_experts = null_experts
        self.gate = nn.Linear(hidden, experts + null_experts, bias=False)
        self.w_gate_EFD = nn.Parameter(torch.randn(experts, expert_hidden, hidden) * hidden**-0.5)
        self.w_up_EFD = nn.Parameter(torch.randn(experts, expert_hidden, hidden) * hidden**-0.5)
        self.w_down_EDF = nn.Parameter(torch.randn(experts, hidden, expert_hidden) * expert_hidden**-0.5)
        self.shared = (
            SharedExperts(hidden=hidden, expert_hidden=expert_hidden, experts=shared_experts)
            if shared_experts
            else None
        )
        self.null = NullExperts(hidden=hidden, experts=null_experts, kind=null_kind) if null_experts else None

    @property
    def experts(self) -> int:
        """E."""
        return int(self.w_gate_EFD.shape[0])

    def candidates(self, logits_TX: Tensor, source_rank_T: Tensor) -> Candidates:
        """What the gate's logits [T, E + N] offer a policy."""
        return Candidates.from_logits(logits_TX, source_rank_T, gate=self.gate_kind, null_experts=self.null_experts)

    def forward(
        self, x_TD: Tensor, rule: TrainingRule, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The training path: (output [T, D], the router's loss, a scalar); `generator` draws from pools.

        Pairs over an expert's capacity are dropped. The loss is that of Switch (arXiv 2101.03961) over k choices:
        balance * E * sum of f_e P_e, with f_e expert e's share of the pairs and P_e its mean probability; of a sigmoid
        gate, its mean share of a token's scores (DeepSeek-V3, arXiv 2412.19437, equation 19). Null experts count among
        the E, and each has the mean f_e of all of them, so that only their sum is balanced (AdaMoE, arXiv 2406.13233).
        The entropy of a token's shares, over its largest, log(E), is added `ranking` times. Ids count what is there.
        """
        tokens, k, kept = x_TD.shape[0], rule.top_k, rule.experts
        experts = self.experts if kept is None else len(kept)
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TX, probs_TX = self._scores(self._of_kept(self.gate(x_TD.float()), kept))
        best_TK, ids_TK = _drawn(scores_TX, k, rule.pool or k, generator)
        weights_TK = self._weights(best_TK, ids_TK, experts)
        w_gate_EFD, w_up_EFD, w_down_EDF = (
            weight if kept is None else weight[list(kept)]
            for weight in (self.w_gate_EFD, self.w_up_EFD, self.w_down_EDF)
        )

        # Every token's first choice queues before any second choice.
        pair_NX = F.one_hot(ids_TK.T.reshape(-1), experts + self.null_experts)
        place_N = (pair_NX.cumsum(dim=0) * pair_NX).sum(dim=-1) - 1
        place_TK = place_N.view(k, tokens).T
        capacity = Capacity(factor=rule.capacity_factor).pairs_per_expert(tokens, k, experts + self.null_experts)
        kept_TK = (place_TK < capacity) & (ids_TK < experts)
        row_TK = torch.where(kept_TK, ids_TK * capacity + place_TK, experts * capacity)

        # Rows no pair fills read token 0; nothing reads their output. The row behind the last takes dropped pairs.
        token_of_row = torch.zeros(experts * capacity + 1, dtype=torch.int64, device=x_TD.device)
        token_TK = torch.arange(tokens, device=x_TD.device)[:, None].expand(tokens, k)
        token_of_row[row_TK.reshape(-1)] = token_TK.reshape(-1)
        if torch.is_autocast_enabled(x_TD.device.type):
            # Before they are gathered, so that fewer bytes are.
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        rows_ECD = x_TD.index_select(0, token_of_row[:-1]).view(experts, capacity, -1)
        w_in_E2FD = torch.cat((w_gate_EFD, w_up_EFD), dim=1)
        gate_ECF, up_ECF = torch.bmm(rows_ECD, w_in_E2FD.mT).chunk(2, dim=-1)
        inner_ECF = F.silu(gate_ECF) * up_ECF
        out_ND = torch.bmm(inner_ECF, w_down_EDF.mT).flatten(0, 1)
        read_TK = torch.where(kept_TK, row_TK, 0)
        pairs_TKD = out_ND.index_select(0, read_TK.reshape(-1)).view(tokens, k, -1)
        out_TD = (pairs_TKD * (weights_TK * kept_TK)[:, :, None].to(pairs_TKD.dtype)).sum(dim=1)

        if self.shared is not None:
            out_TD = out_TD + self.shared(x_TD)
        share_X = pair_NX.sum(dim=0) / (tokens * k)
        if self.null is not None:
            null_N = torch.arange(experts, experts + self.null_experts, device=x_TD.device)
            out_TD = out_TD + self.null(x_TD, ((ids_TK[:, :, None] == null_N) * best_TK[:, :, None]).sum(dim=1))
            share_X = torch.cat((share_X[:experts], share_X[experts:].mean().expand(self.null_experts)))
        loss = rule.balance * share_X.numel() * (share_X * probs_TX.mean(dim=0)).sum()
        if rule.ranking and probs_TX.shape[1] > 1:
            entropy_T = torch.special.entr(probs_TX).sum(dim=-1)
            loss = loss + rule.ranking * entropy_T.mean() / math.log(probs_TX.shape[1])
        return out_TD, loss

    @torch.no_grad()
    def routed(
        self,
        x_TD: Tensor,
        policy: RoutingPolicy,
        context: RouteContext,
        source_rank_T: Tensor,
        state: State,
        *,
        kept: Sequence[int] | None = None,
    ) -> tuple[Tensor, Assignment, State]:
        """The path of a deployment: what `policy` keeps of x_TD [T, D] and shared experts are computed, nothing else.

        `context.renormalise` rules, not the layer's own. `kept`: only these experts are there, ids ascending, and
        policy and assignment count them from 0, as in a layer that has no others (None: all). No weights move, so the
        next call may keep others. Returns the output [T, D] (what shared and null experts give, for a token all of
        whose pairs were dropped), the assignment, and the policy's next state.
        """
        logits_TX = self._of_kept(self.gate(x_TD), kept)
        assignment, state = policy.route(self.candidates(logits_TX, source_rank_T), context, state)
        expert_N, order_N = torch.sort(assignment.ids_TK[assignment.kept_TK], stable=True)
        token_N = assignment.kept_TK.nonzero()[:, 0][order_N]
        weight_N = assignment.weights_TK[assignment.kept_TK][order_N]
        if kept is not None:
            expert_N = torch.as_tensor(kept, device=expert_N.device)[expert_N]
        counts_E = torch.bincount(expert_N, minlength=self.experts).tolist()
        out_ND = expert_mlp(x_TD[token_N], counts_E, self.w_gate_EFD, self.w_up_EFD, self.w_down_EDF)
        out_TD = torch.zeros_like(x_TD).index_add_(0, token_N, out_ND * weight_N[:, None])
        if self.shared is not None:
            out_TD += self.shared(x_TD)
        if self.null is not None:
            out_TD += self.null(x_TD, assignment.null_weights_TN)
        return out_TD, assignment, state

    def _of_kept(self, logits_TX: Tensor, kept: Sequence[int] | None) -> Tensor:
        """The columns of the experts that are there, and of the null ones."""
        if kept is None:
            return logits_TX
        return logits_TX[:, [*kept, *range(self.experts, self.experts + self.null_experts)]]

    def _scores(self, logits_TX: Tensor) -> tuple[Tensor, Tensor]:
        """The score of each expert, and its share of the token's scores: both [T, E + N]."""
        if self.gate_kind == "softmax":
            probs_TX = torch.softmax(logits_TX, dim=-1)
            return probs_TX, probs_TX
        scores_TX = torch.sigmoid(logits_TX)
        return scores_TX, scores_TX / scores_TX.sum(dim=-1, keepdim=True)

    def _weights(self, best_TK: Tensor, ids_TK: Tensor, experts: int) -> Tensor:
        """The factor on the output of each chosen one of `experts` experts [T, K], 0 for null ones."""
        if self.null is None and self.renormalise:
            return best_TK / best_TK.sum(dim=-1, keepdim=True)
        real_TK = best_TK * (ids_TK < experts)
        if not self.renormalise:
            return real_TK
        total_T1 = real_TK.sum(dim=-1, keepdim=True)
        return real_TK / torch.where(total_T1 > 0, total_T1, 1.0)


def _drawn(scores_TX: Tensor, k: int, pool: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The scores and ids of k of each token's best `pool` experts [T, K], drawn evenly, best first."""
    best_TP, ids_TP = torch.topk(scores_TX, pool)
    if pool == k:
        return best_TP, ids_TP
    key_TP = torch.rand(best_TP.shape, generator=generator, device=best_TP.device)
    place_TK = torch.topk(key_TP, k).indices.sort(dim=1).values
    return best_TP.gather(1, place_TK), ids_TP.gather(1, place_TK)
