"""A part of a model for each task: fewer experts, chosen by what a domain's text needs, switched from batch to batch.

The whole model stays in memory and nothing is rebuilt; `mr.extract` writes a part as a model of its own. The model here
is tiny and trains in seconds, so that its figures say little, and differ from machine to machine.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import moeroute as mr

DOMAINS = ("code", "legal")
EXPERTS = 4


def main() -> None:
    with TemporaryDirectory() as folder:
        trained = mr.trained_model(
            mr.make_recipe("plain"),
            config=mr.LanguageModelConfig(hidden=32, layers=2, heads=2, expert_hidden=32, top_k=2, context=64),
            hyper=mr.Hyperparameters(steps=200, limit_s=None),
            folder=Path(folder),
        )
    model, corpus = trained.model, trained.corpus
    whole = model.config.whole
    overall = mr.choose_part(model, corpus, experts=EXPERTS)
    parts = {domain: mr.choose_part(model, corpus, experts=EXPERTS, domain=domain) for domain in DOMAINS}

    def loss(text_BS: torch.Tensor, part: mr.SubNetwork) -> float:
        step = model.routed(text_BS[:, :-1], part.policy, part=part)
        return torch.nn.functional.cross_entropy(step.logits_BSV.mT, text_BS[:, 1:]).item()

    # Text that nothing was trained or chosen on: batches of 16 sequences, each of one domain, domains in turn.
    text_NS, domain_N = corpus.sequences(256, model.config.context + 1, 0, use="measure")
    of_domain = [torch.from_numpy(text_NS[domain_N == corpus.domains.index(name)]).long() for name in DOMAINS]
    losses: dict[str, list[list[float]]] = {domain: [] for domain in DOMAINS}
    for batches in zip(*(text_NS.split(16) for text_NS in of_domain), strict=True):
        for domain, other, text_BS in zip(DOMAINS, reversed(DOMAINS), batches, strict=True):
            running = (whole, parts[domain], overall, parts[other])
            losses[domain].append([loss(text_BS, part) for part in running])

    print("loss, nats/byte  whole model  its part  overall part  the other's part")
    for domain, rows in losses.items():
        means = torch.tensor(rows).mean(dim=0).tolist()
        print("{:16} {:11.3f} {:9.3f} {:13.3f} {:17.3f}".format(domain, *means))
    size = mr.size_of(model, overall)
    print(f"a part alone: {size.weight_bytes:,} bytes, {size.total_share:.0%} of the whole model's")
    used = sum(
        len({expert for part in parts.values() for expert in part.experts_LE[layer]}) for layer in whole.layers_L
    )
    print(f"both parts: {used} of {whole.depth * whole.experts} experts need to be in memory")


main()
