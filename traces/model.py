"""ModelSpec: the shape of a mixture-of-experts model, as far as routing and its cost depend on it.

T tokens, L MoE layers, E logical experts, K experts a token uses, C recorded candidates, S physical
slots, G ranks, D hidden size, F expert intermediate size. These letters end array names everywhere.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from traces.errors import InputError

ScoreKind = Literal["logits", "softmax", "sigmoid", "softmax_over_topk", "none"]
GateKind = Literal["softmax", "sigmoid"]
NullKind = Literal["zero", "copy", "constant", "mixed"]
AttentionKind = Literal["grouped", "latent", ""]

# Hugging Face spells one quantity several ways; the first key that a config has wins.
_HF_KEYS = {
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok", "experts_per_token", "moe_topk"),
    "expert_hidden": ("moe_intermediate_size", "intermediate_size"),
    "all_layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "vocab": ("vocab_size",),
}

# Multi-head latent attention of DeepSeek-V3's widths (arXiv 2412.19437, section 4.2), the only ones that were measured.
_LATENT_WIDTHS = {
    "hidden_size": 7168,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

# The plain format of weights of at least so many bytes an element, scales included.
_DTYPE_OF_BYTES = {4.0: "float32", 2.0: "bfloat16", 1.0: "fp8", 0.5625: "nvfp4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One mixture-of-experts model.

    Counts are whole numbers, widths are in elements, `weight_bytes` and `activation_bytes` are bytes an
    element (0.5 for 4-bit weights). `weight_dtype` names the weights' format where their bytes do not tell it (8 bits
    may be scaled as a whole, `fp8`, or in blocks, `fp8_block`). `gate` is what makes scores of the router's logits, and
    `renormalise` says whether the scores of a token's chosen experts are scaled to sum to one. `kv_bytes_per_token`
    covers all layers. `expert_groups`: neighbouring experts that the router chooses among together, as many groups of
    equal size (1: it has none).

    `null_experts` of `null_kind` stand behind the E experts in the router, ids E and up, and in `top_k`, but do next to
    no work: they give nothing (`zero`, AdaMoE, arXiv 2406.13233), the token itself (`copy`) or a mix of it and a learnt
    vector (`constant`); `mixed`: the three in turn (MoE++, arXiv 2410.07348).

    What surrounds the MoE layers: `dense_layers` layers come first, with an MLP `dense_hidden` wide in place of
    experts; every layer has attention of `heads` query and `kv_heads` key-value heads, `head_dim` wide, of
    `attention_parameters` over all layers, and logits are `vocab` wide. `attention` is `grouped`, `latent` (of
    DeepSeek-V3's widths) or empty: not known, or of a kind that nothing here can price.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    expert_hidden: int
    expert_matrices: int = 3
    shared_experts: int = 0
    shared_hidden: int = 0
    other_parameters: int = 0
    kv_bytes_per_token: int = 0
    weight_bytes: float = 2.0
    weight_dtype: str | None = None
    activation_bytes: int = 2
    gate: GateKind = "softmax"
    renormalise: bool = True
    expert_groups: int = 1
    null_experts: int = 0
    null_kind: NullKind = "zero"
    dense_layers: int = 0
    dense_hidden: int = 0
    attention: AttentionKind = ""
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    attention_parameters: int = 0
    vocab: int = 0

    def __post_init__(self) -> None:
        for field in ("layers", "experts", "top_k", "hidden", "expert_hidden"):
            if getattr(self, field) < 1:
                raise InputError(f"model {self.name}: {field} is {getattr(self, field)}; it must be at least 1")
        needed = [name for name in ("heads", "kv_heads", "head_dim", "vocab") if self.attention == "grouped"]
        needed += ["heads", "vocab"] if self.attention == "latent" else []
        needed += ["dense_hidden"] if self.dense_layers else []
        for field in needed:
            if getattr(self, field) < 1:
                raise InputError(
                    f"model {self.name}: {field} is {getattr(self, field)}; with its attention or dense layers it must "
                    "be at least 1"
                )
        if self.expert_groups < 1 or self.experts % self.expert_groups:
            raise InputError(
                f"model {self.name}: {self.expert_groups} groups do not divide its {self.experts} experts; "
                "use a divisor of them"
            )
        if self.null_experts < 0:
            raise InputError(f"model {self.name}: null_experts is {self.null_experts}; it must be at least 0")
        for field, known in (("gate", get_args(GateKind)), ("null_kind", get_args(NullKind))):
            if getattr(self, field) not in known:
                raise InputError(f"model {self.name}: {field} is {getattr(self, field)!r}; use {', '.join(known)}")
        if self.top_k > self.all_experts:
            nulls = f" and {self.null_experts} null ones" if self.null_experts else ""
            raise InputError(
                f"model {self.name}: top_k {self.top_k} is more than its {self.experts} experts{nulls}; "
                f"use top_k <= {self.all_experts}"
            )

    @property
    def all_experts(self) -> int:
        """E and the null experts: what the router scores."""
        return self.experts + self.null_experts

    @property
    def dtype(self) -> str:
        """The format of the weights: as given, else the plain one of as many bytes.

        >>> ModelSpec(name="m", layers=1, experts=2, top_k=1, hidden=8, expert_hidden=8, weight_bytes=1.0).dtype
        'fp8'
        """
        if self.weight_dtype is not None:
            return self.weight_dtype
        return next((name for bytes_, name in _DTYPE_OF_BYTES.items() if self.weight_bytes >= bytes_), "mxfp4")

    @property
    def activation_dtype(self) -> str:
        """The format of activations, as they travel unless told otherwise."""
        return "float32" if self.activation_bytes == 4 else "bfloat16"

    @property
    def other_dtype(self) -> str:
        """The format of weights outside the experts: theirs, but bfloat16 beside 4-bit experts."""
        return self.dtype if self.weight_bytes >= 1 else "bfloat16"

    @property
    def other_weight_bytes(self) -> float:
        """Bytes an element of weights outside the experts."""
        return self.weight_bytes if self.weight_bytes >= 1 else 2.0

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert in one layer."""
        return self.expert_matrices * self.hidden * self.expert_hidden

    @property
    def expert_bytes(self) -> float:
        """Bytes that the weights of one routed expert in one layer take."""
        return self.expert_parameters * self.weight_bytes

    @property
    def shared_parameters(self) -> int:
        """Parameters of the shared experts of one layer."""
        return self.shared_experts * self.expert_matrices * self.hidden * self.shared_hidden

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's hidden vector on the wire."""
        return self.hidden * self.activation_bytes

    def flops_per_token(self, experts_used: float) -> float:
        """Floating-point operations a token costs in the experts of all layers (a multiply-add is two).

        Null experts cost none: the mix of a constant one is two products of D, an expert's are thousands.
        """
        return 2.0 * self.layers * (experts_used * self.expert_parameters + self.shared_parameters)

    def cut(self, *, layers: int, experts: int, top_k: int) -> "ModelSpec":
        """The model with fewer layers, experts in each, and experts a token: what is gone takes no memory and no time.

        Attention and the cache go with their layers, routers with their experts; dense layers, embeddings, shared and
        null experts stay. Errors: `InputError` where there are fewer than asked for.
        """
        for field, kept in (("layers", layers), ("experts", experts)):
            if not 1 <= kept <= getattr(self, field):
                raise InputError(f"model {self.name}: {field} to keep are {kept}; use 1 to {getattr(self, field)}")
        every = self.layers + self.dense_layers
        cut_layers = self.layers - layers
        attention = self.attention_parameters * cut_layers // every
        routers = self.hidden * (self.layers * self.all_experts - layers * (experts + self.null_experts))
        return replace(
            self,
            layers=layers,
            experts=experts,
            top_k=top_k,
            expert_groups=1 if experts < self.experts else self.expert_groups,
            other_parameters=max(self.other_parameters - attention - routers, 0),
            attention_parameters=self.attention_parameters - attention,
            kv_bytes_per_token=self.kv_bytes_per_token * (every - cut_layers) // every,
        )

    def to_json(self) -> dict[str, Any]:
        """The spec as a JSON object; `ModelSpec(**document)` reads it back, and fields that it lacks are defaults."""
        return asdict(self)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], *, name: str) -> "ModelSpec":
        """Read a Hugging Face `config.json` of a mixture-of-experts model.

        Attention, embeddings, routers and dense layers go into `other_parameters`, all in the weights' dtype.
        Errors: `InputError` naming the missing key.
        """
        found: dict[str, Any] = {}
        for field, keys in _HF_KEYS.items():
            value = next((config[key] for key in keys if config.get(key) is not None), None)
            if value is None:
                raise InputError(f"{name}: config.json has none of {', '.join(keys)}; is it a mixture of experts?")
            found[field] = int(value)
        layers_all, hidden, heads = found.pop("all_layers"), found["hidden"], found.pop("heads")
        vocab = found.pop("vocab")
        dense_layers = int(config.get("first_k_dense_replace") or 0)
        layers = layers_all - dense_layers
        matrices = 3
        kind: AttentionKind = "grouped"
        head_width = kv_heads = 0
        if config.get("kv_lora_rank"):  # multi-head latent attention keeps one compressed vector a token
            kind = "latent" if all(config.get(key) == width for key, width in _LATENT_WIDTHS.items()) else ""
            kv_width = int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])
            q_rank = int(config.get("q_lora_rank") or hidden)
            qk_width = int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"])
            v_width = int(config["v_head_dim"])
            attention = (
                hidden * q_rank
                + q_rank * heads * qk_width
                + hidden * kv_width
                + int(config["kv_lora_rank"]) * heads * (int(config["qk_nope_head_dim"]) + v_width)
                + heads * v_width * hidden
            )
        else:
            head_width = int(config.get("head_dim") or hidden // heads)
            kv_heads = int(config.get("num_key_value_heads") or heads)
            kv_width = 2 * kv_heads * head_width
            attention = hidden * head_width * (2 * heads + 2 * kv_heads)
        shared_experts = int(config.get("n_shared_experts") or 0)
        shared_hidden = found["expert_hidden"]
        if config.get("shared_expert_intermediate_size"):
            shared_experts, shared_hidden = 1, int(config["shared_expert_intermediate_size"])
        embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
        dense = dense_layers * matrices * hidden * int(config.get("intermediate_size") or 0)
        routers = layers * hidden * found["experts"]
        return cls(
            name=name,
            layers=layers,
            expert_matrices=matrices,
            shared_experts=shared_experts,
            shared_hidden=shared_hidden,
            other_parameters=layers_all * attention + embeddings + dense + routers,
            kv_bytes_per_token=2 * layers_all * kv_width,
            gate="sigmoid" if config.get("scoring_func") == "sigmoid" else "softmax",
            renormalise=bool(config.get("norm_topk_prob", True)),
            expert_groups=int(config.get("n_group") or 1),
            dense_layers=dense_layers,
            dense_hidden=int(config.get("intermediate_size") or 0) if dense_layers else 0,
            attention=kind,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_width,
            attention_parameters=layers_all * attention,
            vocab=vocab,
            **found,
        )
