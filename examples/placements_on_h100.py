"""Does placement matter? One synthetic trace, three placements, eight H100s, SGLang's measured kernels and DeepEP.

Placements are planned on earlier requests than those they serve.
"""

import moeroute as mr

trace = mr.synthetic_trace(mr.preset("qwen3-30b-a3b"), tokens=16_384, zipf=0.6, seed=0)
earlier, later = mr.split_requests(trace, [1, 1])
cluster = mr.gpu_cluster(mr.device("h100_sxm"), ranks=8)
replay = mr.Replay(
    trace=later,
    steps=mr.make_steps(later, phase="prefill", tokens_per_rank=512, ranks=8, limit=2),
    cluster=cluster,
    costs=mr.KernelCosts.shipped(cluster, "sglang", "trtllm"),
    protocol="per_rank",
    dispatch_dtype="fp8",
)
policy = mr.RoutingPolicy(selection=mr.TopK(k=trace.model.top_k))

for algorithm in ("contiguous", "random", "balanced"):
    placement = mr.place(algorithm, earlier.loads_LE(), ranks=8, slots=trace.model.experts)
    report, _, _ = replay.run(policy, placement, intervals=True)
    low_s, high_s = report.interval_s
    print(
        f"{algorithm:10} busiest rank {report.token_imbalance:.2f} x mean, step {report.step_s * 1e3:.2f} ms "
        f"[{low_s * 1e3:.2f}, {high_s * 1e3:.2f}]"
    )
print("beyond what was measured:", {stage: f"{share:.0%}" for stage, share in report.extrapolated.items()})
