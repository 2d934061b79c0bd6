"""Training the reference model: a minute on two cores, the same text in the same order each time."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from router.nn.lm import LanguageModel, LanguageModelConfig
from router.nn.moe import TrainingRule
from router.nn.text import Corpus
from router.nn.threads import one_thread
from traces.errors import MoerouteError
from traces.progress import Progress

_STEPS_BETWEEN_REPORTS = 10
# The first steps are slow, and the clock is never the same twice: it counts only after this share of the limit.
_UNTIMED_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train: `steps` steps of `batch` sequences, cut short at `limit_s` seconds.

    The learning rate rises over the first `warmup` of the run and falls along a cosine to `final_rate` of its
    peak. How far the run is, is the larger of the shares of steps and of time, so a slow machine ends properly too,
    after fewer steps. A thread each computes the gradients of `shards` parts of a batch. The other fields are AdamW's,
    the clipped gradient norm, and `TrainingRule`'s.
    """

    steps: int = 800
    limit_s: float = 72.0
    batch: int = 8
    learning_rate: float = 2e-3
    warmup: float = 0.03
    final_rate: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    capacity_factor: float = 1.5
    balance: float = 0.01
    shards: int = 2
    seed: int = 0

    def time_share(self, elapsed_s: float) -> float:
        """How far the run is by the clock: 0 until a tenth of `limit_s` has gone, 1 at the limit.

        >>> [round(Recipe(limit_s=100.0).time_share(elapsed_s), 6) for elapsed_s in (5.0, 55.0, 100.0)]
        [0.0, 0.5, 1.0]
        """
        return max(0.0, (elapsed_s / self.limit_s - _UNTIMED_SHARE) / (1 - _UNTIMED_SHARE))

    def rate(self, done: float) -> float:
        """The learning rate when the run is at `done`, 0 to 1.

        >>> recipe = Recipe(learning_rate=1.0, warmup=0.1, final_rate=0.0)
        >>> [round(recipe.rate(done), 3) for done in (0.05, 0.1, 0.55, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
        """
        if done < self.warmup:
            return self.learning_rate * done / self.warmup
        cosine = 0.5 + 0.5 * math.cos(math.pi * (done - self.warmup) / (1 - self.warmup))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """What training did: steps done, of them wall seconds, and the loss at its end in nats a byte."""

    steps: int
    seconds: float
    loss: float


def train(
    config: LanguageModelConfig, corpus: Corpus, recipe: Recipe, progress: Progress
) -> tuple[LanguageModel, TrainingRun]:
    """Make a model and train it on the training part of `corpus`, each domain alike.

    Matrices multiply in bfloat16 where this processor is faster at it; weights stay float32. Two runs that have the
    time to do all steps give the same weights.
    Errors: `MoerouteError` if the loss is no longer a number.
    """
    with one_thread():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = LanguageModel(config)
        return model, _run(model, corpus, recipe, progress)


def _run(model: LanguageModel, corpus: Corpus, recipe: Recipe, progress: Progress) -> TrainingRun:
    rule = TrainingRule(top_k=model.config.top_k, capacity_factor=recipe.capacity_factor, balance=recipe.balance)
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.ndim > 1],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    weights = list(model.parameters())
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer.add_param_group({"params": norms, "weight_decay": 0.0})
    random = np.random.default_rng(recipe.seed)
    use_bfloat16 = _bfloat16_is_faster()

    def gradients(text_BS: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_bfloat16, cache_enabled=False):
            logits_BSV, balance_loss = model(text_BS[:, :-1], rule)
        loss = F.cross_entropy(logits_BSV.float().flatten(0, 1), text_BS[:, 1:].flatten())
        return loss.item(), torch.autograd.grad(loss + balance_loss, weights)

    start_s = time.perf_counter()
    recent_loss = math.nan
    step = 0
    with ThreadPoolExecutor(recipe.shards) as workers:
        while (done := max(step / recipe.steps, recipe.time_share(time.perf_counter() - start_s))) < 1:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(done)
            text_BS = _batch(corpus, recipe.batch, model.config.context + 1, random)
            losses, gradients_by_shard = zip(*workers.map(gradients, text_BS.chunk(recipe.shards)), strict=True)
            for weight, *parts in zip(weights, *gradients_by_shard, strict=True):
                # Stacked, since the fused AdamW misreads a gradient that is laid out otherwise than its weight.
                weight.grad = torch.stack(parts).mean(dim=0)
            torch.nn.utils.clip_grad_norm_(weights, recipe.clip_norm)
            optimizer.step()
            loss = sum(losses) / recipe.shards
            recent_loss = loss if step == 0 else 0.95 * recent_loss + 0.05 * loss
            if not math.isfinite(recent_loss):
                raise MoerouteError(
                    f"training diverged at step {step}: the loss is {recent_loss}; lower its learning rate"
                )
            if step % _STEPS_BETWEEN_REPORTS == 0:
                progress(done, f"training the reference model: step {step}, loss {recent_loss:.2f} nats/byte")
            step += 1
    seconds = time.perf_counter() - start_s
    progress(1.0, f"trained the reference model: {step} of {recipe.steps} steps in {seconds:.0f} s")
    return TrainingRun(steps=step, seconds=seconds, loss=recent_loss)


def _batch(corpus: Corpus, batch: int, length: int, random: np.random.Generator) -> Tensor:
    """Training text [batch, length] as int64, domains in turn."""
    rows = []
    for row in range(batch):
        text = corpus.train[row % len(corpus.domains)]
        first = int(random.integers(text.size - length + 1))
        rows.append(text[first : first + length])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _bfloat16_is_faster() -> bool:
    """Whether a matrix product takes less time in bfloat16 than in float32 here."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(512, 512, dtype=dtype)
        trials_s = []
        for _ in range(5):
            start_s = time.perf_counter()
            square @ square
            trials_s.append(time.perf_counter() - start_s)
        seconds[dtype] = min(trials_s)
    return seconds[torch.bfloat16] < seconds[torch.float32]
