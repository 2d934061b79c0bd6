"""What one evaluation of a config costs: route, lower, price and simulate a step, analytic and event.

python benchmarks/replay.py
"""

import os
import statistics
import time

import moeroute as mr

SHAPES = {"gpt-oss-20b": (8, 512), "qwen3-30b-a3b": (16, 512)}
ROUNDS = 7


def main() -> None:
    print(f"{ROUNDS} rounds, load average {os.getloadavg()[0]:.1f}; CPU time of one step")
    for name, (ranks, tokens_per_rank) in SHAPES.items():
        model = mr.preset(name)
        trace = mr.synthetic_trace(model, tokens=ranks * tokens_per_rank, zipf=0.6, seed=0)
        cluster = mr.gpu_cluster(mr.device("h100_sxm"), ranks)
        replay = mr.Replay(
            trace=trace,
            steps=mr.make_steps(trace, phase="prefill", tokens_per_rank=tokens_per_rank, ranks=ranks, limit=1),
            cluster=cluster,
            costs=mr.Roofline(cluster),
        )
        policy = mr.RoutingPolicy(selection=mr.TopK(k=model.top_k), capacity=mr.Capacity(factor=1.25))
        placement = mr.place("lpt", trace.loads_LE(), ranks=ranks, slots=model.experts)
        medians = {}
        for fidelity in ("analytic", "event"):
            seconds = []
            for round_ in range(ROUNDS + 1):
                start = time.process_time()
                replay.run(policy, placement, fidelity=fidelity)
                if round_:  # the first compiles
                    seconds.append(time.process_time() - start)
            medians[fidelity] = statistics.median(seconds)
        print(
            f"{name}, {model.layers} layers, {ranks} ranks x {tokens_per_rank} tokens: "
            f"analytic {medians['analytic'] * 1e3:.0f} ms, event {medians['event'] * 1e3:.0f} ms"
        )


if __name__ == "__main__":
    main()
