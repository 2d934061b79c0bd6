"""The torch side: the reference model, its MoE layer, and the expert-parallel run."""
