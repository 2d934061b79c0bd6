"""Placing: what `moeroute place` answers, from loads or from a trace: a plan, whether it is worth it and why."""
