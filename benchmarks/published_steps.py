"""Whole steps of the cases in `published.yaml`: from a case's inputs to seconds, by the functions that users call."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

import moeroute as mr
from cost_models.cluster import Cluster, gpu_cluster
from cost_models.kernel_costs import KernelCosts
from cost_models.ops import CostModel, TokenExchange
from router.assignment import Assignment
from router.placement import place
from router.placement.base import Placement
from sim.analytic import simulate_analytic
from sim.blocks import blocks_of
from sim.execution import OVERLAP_PACE, Execution
from sim.layout import Layout
from sim.lower import Work, lower
from sim.program import Program
from sim.timeline import Timeline
from traces.context import Context
from traces.model import ModelSpec
from traces.routing import balanced_experts, choose_experts, power_law_popularity

Case = dict[str, Any]
Ids = NDArray[np.int32]
# Groups of experts, and how many of them a token keeps (the models' config.json; Kimi-K2 has one). DeepSeek-V2 scores
# a group by its best expert, which is drawn here by its two best as DeepSeek-V3 does.
_GROUPS = {"deepseek-v3": (8, 4), "deepseek-v2": (8, 3)}
_FRAMEWORKS = ("sglang", "trtllm")
_PLANNED = 1000  # seeds of the tokens that a placement is planned on start here
_DRIFTED = 2000  # and those of a drift here


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How tokens choose where routing is skewed: `exponent` of the power law, in `layers` drawn one by one.

    Each drawn layer stands for an equal part of the model's. `drift`: sigma of the log-normal factors by which experts
    become more or less popular between the tokens that a placement is planned on and those of the step.
    """

    exponent: float
    layers: int
    drift: float = 0.0

    @classmethod
    def of(cls, file: Case) -> "Drawing":
        """As the data file says."""
        return cls(exponent=file["skew"]["exponent"], layers=file["drawn_layers"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A simulated step: its timeline, and tokens that each rank gets done in it."""

    timeline: Timeline
    tokens_per_rank: int

    @property
    def tokens_per_s(self) -> float:
        """Of one rank."""
        return self.tokens_per_rank / self.timeline.step_s


def step_of(given: Case, drawing: Drawing) -> Step:
    """Simulate the step of a case's inputs."""
    return _step_of(json.dumps({name: value for name, value in given.items() if name != "without"}), drawing)


@cache
def _step_of(given_json: str, drawing: Drawing) -> Step:
    given = json.loads(given_json)
    tokens = given["ranks"] * given["tokens_per_rank"]
    model = mr.preset(given["model"])
    if given["routing"] == "balanced":  # every slot gets the same rows: slots are experts of their own
        model = replace(model, experts=model.experts + given["redundant_slots"])
    ids_LTK = drawn(model, given["routing"], tokens, drawing)
    works = works_of(given, model, ids_LTK, _placement(given, model, drawing))
    timeline = timeline_of(given, works, kernels(given["device"], given["ranks"]))
    return Step(timeline=timeline, tokens_per_rank=given["tokens_per_rank"])


def works_of(
    given: Case, model: ModelSpec, ids_LTK: Sequence[Ids], placement: Placement, *, layout: Layout | None = None
) -> list[Work]:
    """Lower the drawn tokens to the work of one microbatch, or of two."""
    ranks, tokens = given["ranks"], given["tokens_per_rank"]
    microbatches = 2 if given["overlap"] == "two_batch" else 1
    layout = layout or Layout(node_of_G=np.arange(ranks) // (ranks // given["nodes"]))
    context = _context(given)
    source_rank_T = np.repeat(np.arange(ranks), tokens)
    place_T = np.tile(np.arange(tokens), ranks)
    usual = "per_expert" if given.get("mode") == "low_latency" else "per_rank" if layout.nodes == 1 else "per_node"
    works = []
    for part in range(microbatches):
        part_T = place_T * microbatches // tokens == part
        works.append(
            lower(
                model,
                (_assignment(ids_TK[part_T]) for ids_TK in ids_LTK),
                placement,
                policy=mr.RoutingPolicy(selection=mr.TopK(k=model.top_k)),
                source_rank_T=source_rank_T[part_T],
                layout=layout,
                context=context.halved() if microbatches == 2 else context,
                protocol=given.get("protocol", usual),
                dispatch_dtype=given.get("dtypes", {}).get("dispatch", "fp8"),
                row_of_layer=np.arange(model.layers) * placement.layers // model.layers,
            )
        )
    return works


def timeline_of(given: Case, works: Sequence[Work], costs: CostModel) -> Timeline:
    """Price and simulate the microbatches of a step."""
    device, execution = mr.device(given["device"]), _execution(given)
    return simulate_analytic(Program.of([blocks_of(work, costs, execution, device=device) for work in works]))


def dispatch_of(given: Case, drawing: Drawing) -> TokenExchange:
    """One dispatch of a case's inputs, layer by layer of those that are drawn; experts lie in order."""
    model = replace(mr.preset(given["model"]), experts=given["experts"], top_k=given["top_k"], hidden=given["hidden"])
    ids_LTK = drawn(model, given["routing"], given["ranks"] * given["tokens_per_rank"], drawing, nodes=given["nodes"])
    given = {"overlap": "none", "phase": "prefill", "prompt_tokens": given["tokens_per_rank"], **given}
    (work,) = works_of(given, model, ids_LTK, contiguous(model, given["ranks"], drawing.layers))
    return replace(work.exchange("dispatch"), sms_X=np.array(given["sms"]))


def contiguous(model: ModelSpec, ranks: int, layers: int) -> Placement:
    """Experts in order, one slot each."""
    return place("contiguous", np.ones((layers, model.experts)), ranks=ranks, slots=model.experts)


@lru_cache(maxsize=6)  # up to 70 MB each
def drawn(model: ModelSpec, routing: str, tokens: int, drawing: Drawing, *, nodes: int = 1) -> Sequence[Ids]:
    """The experts of all ranks' tokens in one step, layer by layer.

    With `intranode_skew` the experts of each of `nodes` nodes are skewed alike, and nodes have equal shares.
    """
    if routing == "balanced":
        return [balanced_experts(model, tokens=tokens, slots=model.experts)] * drawing.layers
    return [_chosen(model, routing, tokens, drawing, layer, nodes=nodes) for layer in range(drawing.layers)]


def planned_loads(model: ModelSpec, routing: str, tokens: int, drawing: Drawing) -> NDArray[np.int64]:
    """Loads of experts, [L, E], of an earlier step, before any drift."""
    return _loads(model, routing, tokens, replace(drawing, drift=0.0))


@cache
def _loads(model: ModelSpec, routing: str, tokens: int, drawing: Drawing) -> NDArray[np.int64]:
    chosen = (_chosen(model, routing, tokens, drawing, layer, first_seed=_PLANNED) for layer in range(drawing.layers))
    return np.stack([np.bincount(ids_TK.ravel(), minlength=model.experts) for ids_TK in chosen])


def _chosen(
    model: ModelSpec,
    routing: str,
    tokens: int,
    drawing: Drawing,
    layer: int,
    *,
    nodes: int = 1,
    first_seed: int = 0,
) -> Ids:
    groups, kept = (1, 1) if routing == "intranode_skew" else _GROUPS.get(model.name, (1, 1))
    popularity_E = np.full(model.experts, 1 / model.experts)
    if routing != "uniform":
        share_X = power_law_popularity(model.experts // nodes, exponent=drawing.exponent, tokens=tokens, seed=layer)
        popularity_E = np.tile(share_X, nodes) / nodes
    if drawing.drift:
        noise_E = np.random.default_rng(_DRIFTED + layer).standard_normal(model.experts)
        popularity_E *= np.exp(drawing.drift * noise_E)
        popularity_E /= popularity_E.sum()
    return choose_experts(
        popularity_E, tokens=tokens, top_k=model.top_k, seed=first_seed + layer, groups=groups, kept_groups=kept
    )


def _assignment(ids_TK: Ids) -> Assignment:
    kept_TK = np.ones(ids_TK.shape, dtype=bool)
    weights_TK = np.full(ids_TK.shape, 1 / ids_TK.shape[1], dtype=np.float32)
    return Assignment(
        ids_TK=ids_TK, scores_TK=weights_TK, weights_TK=weights_TK, kept_TK=kept_TK, rerouted_TK=np.zeros_like(kept_TK)
    )


def _placement(given: Case, model: ModelSpec, drawing: Drawing) -> Placement:
    ranks, experts = given["ranks"], model.experts
    slots = experts + (0 if given["routing"] == "balanced" else given["redundant_slots"])
    slot_to_expert_LS = np.tile(np.arange(slots) % experts, (drawing.layers, 1))
    if given["placement"] in ("eplb", "hottest_everywhere"):
        tokens = ranks * given["tokens_per_rank"]
        loads_LE = planned_loads(model, given["routing"], tokens, drawing)
        if given["placement"] == "eplb":
            return place("lpt", loads_LE, ranks=ranks, slots=slots)
        slot_to_expert_LS = np.stack([_hottest_everywhere(load_E, ranks, slots) for load_E in loads_LE])
    elif given["placement"] == "round_robin":
        slot_to_expert_LS = slot_to_expert_LS.reshape(drawing.layers, -1, ranks).swapaxes(1, 2)
        slot_to_expert_LS = slot_to_expert_LS.reshape(drawing.layers, slots)
    return Placement(slot_to_expert_LS=slot_to_expert_LS, experts=experts, ranks=ranks)


def _hottest_everywhere(load_E: NDArray[np.int64], ranks: int, slots: int) -> NDArray[np.int64]:
    """The hottest experts on every rank, the others placed once by longest processing time."""
    everywhere = (slots - load_E.size) // (ranks - 1)
    order_E = np.argsort(-load_E, kind="stable")
    hot, rest = order_E[:everywhere], order_E[everywhere:]
    packed = place("lpt", load_E[rest][None], ranks=ranks, slots=slots - ranks * everywhere).slot_to_expert_LS[0]
    placed_GX = rest[packed].reshape(ranks, -1)
    return np.concatenate([np.tile(hot, (ranks, 1)), placed_GX], axis=1).ravel()


def _context(given: Case) -> Context:
    tokens = given["tokens_per_rank"]
    if given["phase"] == "decode":
        return Context.even(
            "decode", ranks=given["ranks"], requests=tokens, new_tokens=1, cached_tokens=given["kv_tokens"]
        )
    prompt = min(given["prompt_tokens"], tokens)
    return Context.even("prefill", ranks=given["ranks"], requests=tokens / prompt, new_tokens=prompt, cached_tokens=0)


def _execution(given: Case) -> Execution:
    tokens = given["tokens_per_rank"]
    dtypes = given.get("dtypes", {})
    return Execution(
        extent=given.get("extent", "whole" if mr.preset(given["model"]).attention else "moe"),
        overlap=given["overlap"],
        graph_buckets=(tokens // 2, tokens) if given.get("cuda_graph", given["phase"] == "decode") else (),
        comm_sms=given.get("sms", 20),
        overlap_pace=given.get("pace", OVERLAP_PACE),
        kv_dtype=dtypes.get("kv", "bfloat16"),
        attention_dtype=dtypes.get("gemm", "fp8_block"),
    )


@cache
def cluster_of(device: str, ranks: int) -> Cluster:
    """So many GPUs of one kind, on nodes as the device has them."""
    return gpu_cluster(mr.device(device), ranks)


@cache
def kernels(device: str, ranks: int, frameworks: tuple[str, ...] = _FRAMEWORKS) -> KernelCosts:
    """Measured kernels, by default SGLang's where there are some."""
    return KernelCosts.shipped(cluster_of(device, ranks), *frameworks)
