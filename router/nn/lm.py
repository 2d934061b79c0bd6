"""A byte-level transformer language model with a mixture of experts in every block."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from router.assignment import Assignment
from router.context import RouteContext, State
from router.history import RoutingHistory
from router.nn.moe import MoELayer, TrainingRule
from router.policies import RoutingPolicy
from router.prices import RoutePrices
from router.subnetwork import SubNetwork
from traces.errors import InputError
from traces.model import GateKind, ModelSpec, NullKind


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelConfig:
    """The model's shape: widths in elements, `context` in bytes of text (one byte is one token).

    `gate`, `renormalise`, `shared_experts` (as wide as the others), `null_experts` and `null_kind` are as in
    `ModelSpec`: a token uses `top_k` of the experts and null experts together, or in layer l `top_k_L[l]`, of which
    `top_k` is then the largest.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 16
    expert_hidden: int = 128
    top_k: int = 4
    context: int = 128
    vocab: int = 256
    gate: GateKind = "softmax"
    renormalise: bool = True
    shared_experts: int = 0
    null_experts: int = 0
    null_kind: NullKind = "zero"
    top_k_L: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            raise InputError(f"hidden ({self.hidden}) must be a multiple of twice the heads ({self.heads})")
        for field in ("shared_experts", "null_experts"):
            if getattr(self, field) < 0:
                raise InputError(f"{field} is {getattr(self, field)}; it must be at least 0")
        every = self.experts + self.null_experts
        if not 1 <= self.top_k <= every:
            nulls = f" and {self.null_experts} null ones" if self.null_experts else ""
            raise InputError(f"top_k is {self.top_k}; with {self.experts} experts{nulls} use 1 to {every}")

        if self.top_k_L is not None and (len(self.top_k_L) != self.layers or max(self.top_k_L) != self.top_k):
            raise InputError(
                f"top_k_L is {self.top_k_L}; give one of each of {self.layers} layers, {self.top_k} the largest"
            )

    @property
    def policy(self) -> RoutingPolicy:
        """The policy that the model was trained for or cut to, without a capacity."""
        return self.whole.policy

    @property
    def whole(self) -> SubNetwork:
        """All of the model."""
        whole = SubNetwork.whole(self.layers, self.experts, self.top_k)
        return whole if self.top_k_L is None else replace(whole, top_k_L=self.top_k_L)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedStep:
    """What one step of the model under a policy gave: `logits_BSV`, and an assignment and a next state a layer."""

    logits_BSV: Tensor
    assignments: tuple[Assignment, ...]
    states: tuple[State, ...]


_EXPERT_WEIGHTS = ("moe.w_gate_EFD", "moe.w_up_EFD", "moe.w_down_EDF")


class Attention(nn.Module):
    """Causal self-attention with rotary positions (arXiv 2104.09864)."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.w_qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.w_out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x_BSD: Tensor, turn_2SX: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]; `turn_2SX` holds the cosines and sines of `rotary`."""
        batch, length, hidden = x_BSD.shape
        qkv_3BHSX = self.w_qkv(x_BSD).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q_ASX, k_ASX = _rotate(qkv_3BHSX[:2], turn_2SX).flatten(1, 2)
        v_ASX = qkv_3BHSX[2].flatten(0, 1)
        # Written out: on a CPU scaled_dot_product_attention and its backward take far longer in bfloat16.
        future_SS = torch.full((length, length), -torch.inf, dtype=q_ASX.dtype, device=q_ASX.device).triu(1)
        scores_ASS = torch.baddbmm(future_SS, q_ASX, k_ASX.mT, alpha=q_ASX.shape[-1] ** -0.5)
        out_ASX = torch.bmm(torch.softmax(scores_ASS, dim=-1, dtype=q_ASX.dtype), v_ASX)
        out_BSHX = out_ASX.view(batch, self.heads, length, -1).transpose(1, 2)
        out_BSD: Tensor = self.w_out(out_BSHX.reshape(batch, length, hidden))
        return out_BSD


class Block(nn.Module):
    """Attention, then the mixture of experts, each on normalised input and added to the residual stream."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(config.hidden)
        self.attention = Attention(config)
        self.norm_moe = nn.RMSNorm(config.hidden)
        self.moe = MoELayer(
            hidden=config.hidden,
            expert_hidden=config.expert_hidden,
            experts=config.experts,
            gate_kind=config.gate,
            renormalise=config.renormalise,
            shared_experts=config.shared_experts,
            null_experts=config.null_experts,
            null_kind=config.null_kind,
        )


class LanguageModel(nn.Module):
    """Predicts the next byte. `blocks[l].moe` is MoE layer l."""

    turn_2SX: Tensor

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        self.register_buffer("turn_2SX", _rotary(config.context, config.hidden // config.heads), persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self._blocks():  # the residual stream starts small however many layers add to it
            nn.init.normal_(block.attention.w_out.weight, std=config.hidden**-0.5 / (2 * config.layers) ** 0.5)
            with torch.no_grad():
                block.moe.w_down_EDF.div_((2 * config.layers) ** 0.5)
                if block.moe.shared is not None:
                    block.moe.shared.w_down_DF.div_((2 * config.layers) ** 0.5)

    @property
    def moe_layers(self) -> tuple[MoELayer, ...]:
        """The mixture of experts of each block."""
        return tuple(block.moe for block in self._blocks())

    def forward(
        self,
        tokens_BS: Tensor,
        rules: Sequence[TrainingRule | None],
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The training path: (logits [B, S, V], the sum of the routers' losses).

        A rule a layer; a layer without one is left out, its attention too. `generator` is what `MoELayer` draws from.
        """
        x_BSD = self.embedding(tokens_BS)
        router_loss = torch.zeros((), device=x_BSD.device)
        for block, rule in zip(self._blocks(), rules, strict=True):
            if rule is None:
                continue
            x_BSD = x_BSD + block.attention(block.norm_attention(x_BSD), self.turn_2SX[:, : tokens_BS.shape[1]])
            out_TD, layer_loss = block.moe(block.norm_moe(x_BSD).flatten(0, 1), rule, generator)
            x_BSD = x_BSD + out_TD.view(x_BSD.shape)
            router_loss = router_loss + layer_loss
        return self.head(self.norm(x_BSD)), router_loss

    @torch.no_grad()
    def routed(
        self,
        tokens_BS: Tensor,
        policy: RoutingPolicy,
        *,
        source_rank_T: Tensor | None = None,
        ranks: int = 1,
        states: Sequence[State] | None = None,
        history: RoutingHistory | None = None,
        prices: RoutePrices | None = None,
        part: SubNetwork | None = None,
    ) -> RoutedStep:
        """One step of all B * S tokens under `policy`: only the pairs it keeps are computed.

        `source_rank_T` says which of `ranks` holds each token (all of them rank 0 if it is None), `states` what the
        policy remembers in each layer (nothing if it is None); `history` and `prices` are what a policy may ask for.
        `part`: only this much of the model is there (None: all of it), and a next call may take another part; layers
        and experts count what is there. The policy says how many experts a token uses: `part.policy` does as the part.
        """
        x_BSD = self.embedding(tokens_BS)
        if source_rank_T is None:
            source_rank_T = torch.zeros(tokens_BS.numel(), dtype=torch.int64, device=tokens_BS.device)
        assignments, next_states = [], []
        part = part or self.config.whole
        part.check_within(self.config.layers, self.config.experts, self.config.null_experts)
        blocks = self._blocks()
        for layer, (whole_layer, experts_E) in enumerate(zip(part.layers_L, part.experts_LE, strict=True)):
            block = blocks[whole_layer]
            x_BSD = x_BSD + block.attention(block.norm_attention(x_BSD), self.turn_2SX[:, : tokens_BS.shape[1]])
            context = RouteContext(
                layer=layer,
                ranks=ranks,
                renormalise=self.config.renormalise,
                top_k=part.top_k,
                history=history,
                prices=prices,
            )
            out_TD, assignment, state = block.moe.routed(
                block.norm_moe(x_BSD).flatten(0, 1),
                policy,
                context,
                source_rank_T,
                states[layer] if states else {},
                kept=None if len(experts_E) == self.config.experts else experts_E,
            )
            x_BSD = x_BSD + out_TD.view(x_BSD.shape)
            assignments.append(assignment)
            next_states.append(state)
        logits_BSV = self.head(self.norm(x_BSD))
        return RoutedStep(logits_BSV=logits_BSV, assignments=tuple(assignments), states=tuple(next_states))

    def extract(self, part: SubNetwork) -> "LanguageModel":
        """The part as a model of its own, with copies of its weights and none of the others.

        Errors: `InputError` where it is no part of this one.
        """
        config = self.config
        part.check_within(config.layers, config.experts, config.null_experts)
        small = LanguageModel(
            replace(
                config,
                layers=part.depth,
                experts=part.experts,
                top_k=part.top_k,
                top_k_L=None if len(set(part.top_k_L)) == 1 else part.top_k_L,
            )
        )
        ours = self.state_dict()
        weights = {name: value for name, value in ours.items() if not name.startswith("blocks.")}
        for layer, (whole_layer, experts_E) in enumerate(zip(part.layers_L, part.experts_LE, strict=True)):
            kept = torch.tensor(experts_E)
            with_nulls = torch.cat((kept, torch.arange(config.experts, config.experts + config.null_experts)))
            prefix = f"blocks.{whole_layer}."
            for name, value in ours.items():
                if not name.startswith(prefix):
                    continue
                inside = name.removeprefix(prefix)
                rows = {"moe.gate.weight": with_nulls, **dict.fromkeys(_EXPERT_WEIGHTS, kept)}.get(inside)
                weights[f"blocks.{layer}.{inside}"] = value if rows is None else value[rows]
        small.load_state_dict(weights)
        small.train(self.training)
        return small

    def spec(self, name: str = "reference") -> ModelSpec:
        """The model as the simulator sees it, by `name`: float32 weights, activations and key-value cache."""
        config = self.config
        expert_parameters = sum(
            weight.numel() for moe in self.moe_layers for weight in (moe.w_gate_EFD, moe.w_up_EFD, moe.w_down_EDF)
        )
        shared_parameters = sum(
            weight.numel() for moe in self.moe_layers if moe.shared is not None for weight in moe.shared.parameters()
        )
        all_parameters = sum(weight.numel() for weight in self.parameters())
        return ModelSpec(
            name=name,
            layers=config.layers,
            experts=config.experts,
            top_k=config.top_k,
            hidden=config.hidden,
            expert_hidden=config.expert_hidden,
            shared_experts=config.shared_experts,
            shared_hidden=config.expert_hidden if config.shared_experts else 0,
            other_parameters=all_parameters - expert_parameters - shared_parameters,
            kv_bytes_per_token=2 * config.layers * config.hidden * 4,
            weight_bytes=4,
            activation_bytes=4,
            gate=config.gate,
            renormalise=config.renormalise,
            null_experts=config.null_experts,
            null_kind=config.null_kind,
        )

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]


def _rotary(length: int, width: int) -> Tensor:
    """Cosines and sines of each position's angles: [2, S, X / 2], for heads of width X."""
    rate_X = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angle_SX = torch.arange(length)[:, None] * rate_X
    return torch.stack((angle_SX.cos(), angle_SX.sin()))


def _rotate(x_BHSX: Tensor, turn_2SX: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + X/2}) by its position's angle."""
    cos_SX, sin_SX = turn_2SX.to(x_BHSX.dtype)
    left, right = x_BHSX.chunk(2, dim=-1)
    return torch.cat((left * cos_SX - right * sin_SX, left * sin_SX + right * cos_SX), dim=-1)
