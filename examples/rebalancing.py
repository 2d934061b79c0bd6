"""When should experts move? Traffic turns to other requests; EPLB at a fixed interval against moves that pay.

Every rebalancer sees earlier steps alone. While weights move, the step waits.
"""

from dataclasses import replace

import moeroute as mr

model = replace(mr.preset("qwen3-30b-a3b"), layers=6)
before, after = (mr.synthetic_trace(model, tokens=65_536, zipf=0.7, seed=seed, phase="prefill") for seed in (0, 1))
cluster = mr.gpu_cluster(mr.device("h100_sxm"), ranks=8)
steps = mr.ReplayedSteps(
    replay=mr.Replay(
        trace=after,
        steps=mr.make_steps(after, phase="prefill", tokens_per_rank=256, ranks=8, limit=32),
        cluster=cluster,
        costs=mr.KernelCosts.shipped(cluster, "sglang", "trtllm", "nccl"),
        execution=mr.Execution(extent="moe"),
    ),
    policy=mr.RoutingPolicy(selection=mr.TopK(k=model.top_k)),
)
start = mr.place("balanced", before.loads_LE(), ranks=8, slots=144)

for rebalancer in (
    mr.Never(),
    mr.Replan(every=8, window=8, algorithm="eplb"),
    mr.Incremental(every=8, window=8, budget_share=0.05),
    mr.WhenItPays(every=4, window=8, horizon=28, step_s=steps.predicted_s(start.slots), move_s=steps.move_s),
):
    run = steps.serve(rebalancer, start)
    print(
        f"{run.name:37} {run.rebalancings} times, {run.moved:4} slots filled: "
        f"steps {run.step_s_W.sum() * 1e3:.1f} ms + stalls {run.stall_s_W.sum() * 1e3:.1f} ms"
    )
