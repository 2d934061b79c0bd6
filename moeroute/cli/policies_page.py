"""The page docs/policies.md, made of what the policies say of themselves."""

from typing import Any

from moeroute.cli.policies_words import KINDS, in_words, needs_in_words, range_in_words

REWRITE = "moeroute policies --markdown > docs/policies.md"

_INTRODUCTION = f"""# Routing policies

Written by `{REWRITE}`; a test holds it against the code.

A routing policy has up to three parts, and goes through them at every step of every layer:

1. a **selection** says which of its candidates each token uses;
2. an **adjustment**, if there is one, sees all tokens of the step, and what hardware asks for each choice, and moves
   tokens to other candidates;
3. a **capacity**, if there is one, limits what an expert or a rank computes, and drops, reroutes or moves the rest.

The simulator and the real MoE layer run the same code. In a scenario:

```yaml
config:
  policy: top_p
  parameters: {{p: 0.7, k_max: 6}}
  adjustment: {{name: opportunistic, k0: 2}}   # leave it out for none
  capacity: {{factor: 1.25, drop: position}}   # no name: the plain capacity; leave it out for none
  weights: trained      # what a skipped expert had goes to no other; left out, the others' weights are scaled to one
output_errors: output_errors.json   # of `moeroute model errors`, for top_k_by_layer; left out, the gate mass lost
study:
  space:              # what a study may choose from; left out: all that the trace can serve
    policies: [top_k, top_p]
    adjustments: [none, opportunistic, hardware_aware]
    capacities: [none]
    ranges:
      top_p.p: [0.3, 0.95]              # from one end to the other
      opportunistic.k0: [1, 2, 4]       # one of these, as are three values or more, and choices
      top_k.k: {{values: [2, 4]}}         # one of these two
      top_p.k_max: 6                    # this
    scopes: [source_rank]               # the default: a real rank knows its own tokens only
```

A range marked *log* is searched evenly in its logarithm, and begins above 0.

## What a policy may need

| it needs | which is there when |
|---|---|
| full scores | the trace recorded, or `candidates:` completes, all experts of each token |
| more candidates than k | the trace recorded more than the model uses, or `candidates: 16` completes it to so many |
| earlier traffic | always: a scenario's plan window |
| placement and prices | always: the scenario's placement and costs |
| null experts | the model was trained with them |

Engines record only what they chose. Completed candidates are guesses, and results that stand on them say `completed`.

## Which one when

| the case | try |
|---|---|
"""
# Situation, then what to try: advice, not measurements; names in backticks are policies.
_ADVICE = (
    (
        "any model, first",
        "`top_k` at the model's own k as the baseline, then `top_p` and `skip`: fewer experts",
    ),
    ("a step time to hold while traffic changes", "`held_top_p`: dynamic k that keeps a budget"),
    ("kernels or graphs that want one k in a layer", "`top_k_by_layer`: fewer experts where the output suffers least"),
    ("a model trained with null experts", "`null_experts`"),
    (
        "decode of few tokens on one node",
        "fewer experts, or nothing: a kernel of its own costs a policy microseconds a layer, more than it saves there",
    ),
    (
        "decode on many ranks, where the busiest rank or the reading of weights is the time",
        "`hardware_aware`; `batch_set` or `opportunistic` where a step leaves experts unused",
    ),
    ("uneven ranks, or slow links between nodes", "`hardware_aware`, `topology_aware`, `group_limited`, `partners`"),
    (
        "experts that do not all fit into memory",
        "`placement: {resident_share: 0.5}` and `hardware_aware`, or `cache_aware`",
    ),
    (
        "prefill, where the fullest expert holds all up",
        "`capacity`, with reroute or `capacity_aware` to lose less",
    ),
    ("uneven load, and no token may be dropped", "`least_loaded_spill`, or `balance_bias` over time"),
    ("to see what even load would bring", "`expert_choice`: for evaluation; by thresholds causal"),
)


def policies_page(described: list[dict[str, Any]]) -> str:
    """The page, of what `router.policies.describe_policies` gives."""
    advice = "".join(f"| {case} | {what} |\n" for case, what in _ADVICE)
    kinds = "".join(
        f"\n## {title[0].upper()}{title[1:]}\n" + "".join(_section(p) for p in described if p["kind"] == kind)
        for kind, title in KINDS.items()
    )
    return _INTRODUCTION + advice + kinds


def _section(policy: dict[str, Any]) -> str:
    lines = [f"\n### {policy['name']}\n\n{policy['description']}\n"]
    if policy["parameters"]:
        lines.append("\n| parameter | meaning | searched | default |\n|---|---|---|---|\n")
        lines += [
            f"| `{p['name']}` | {p['meaning']} | {range_in_words(p)} | {in_words(p['default'])} |\n"
            for p in policy["parameters"]
        ]
    needs = needs_in_words(policy)
    lines.append(f"\n{f'Needs: {needs}. ' if needs else ''}Source: {policy['source']}.\n")
    return "".join(lines)
