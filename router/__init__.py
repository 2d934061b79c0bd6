"""Who computes what: policies, capacity, placement, and the real MoE layer."""
