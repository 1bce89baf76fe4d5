"""The engine's step against a plain PyTorch loop: accumulation, clipping, schedules, AdamW, the average."""

import copy

import pytest
import torch

pytest.importorskip("deepspeed")

from ijepa_fast import config as sections
from ijepa_fast.config import load_config
from ijepa_fast.engine.engine import CPU_BUCKET, choose_device, deepspeed_config, start
from ijepa_fast.run.build import build_engine, build_method
from tests.launch import ROOT, TINY
from tests.small import loss_of

RATES = [(1e-2, 0.1, 0.9), (5e-3, 0.2, 0.99), (2e-2, 0.3, 0.999)]  # learning rate, weight decay, EMA of each step


def plain_steps(config, method, batches):
    """What the engine is to do, in stock PyTorch; -> encoder, predictor and target encoder after the steps."""
    model, target = copy.deepcopy(method), copy.deepcopy(method.target_encoder)
    named = list(model.named_parameters())
    decayed = [p for n, p in named if p.ndim > 1 and not n.endswith("bias")]
    others = [p for n, p in named if p.ndim <= 1 or n.endswith("bias")]
    groups = [{"params": decayed}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, betas=tuple(config.optim.betas), eps=config.optim.eps)
    for (lr, weight_decay, ema), micro_batches in zip(RATES, batches, strict=True):
        for images, draw in micro_batches:
            with torch.no_grad():
                targets = target.targets(model.patchify(images), draw, layers=method.target_layers)
            model.targets = lambda patches, draw, targets=targets: targets
            (loss_of(model, images, draw) / len(micro_batches)).backward()
        if config.optim.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0)):
            group["lr"], group["weight_decay"] = lr, decay
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, p in zip(target.parameters(), model.encoder.parameters()):
                average.mul_(ema).add_(p, alpha=1 - ema)
    return model.encoder, model.predictor, target


@pytest.mark.parametrize(("accumulation", "clip"), [(1, 0.0), (2, 0.0), (2, 0.05)])
@pytest.mark.parametrize("zero", [0, 1])
def test_a_step_is_the_plain_loops(zero, accumulation, clip):
    overrides = [*TINY, f"engine.zero={zero}", f"engine.accumulation={accumulation}", f"optim.clip={clip}"]
    # Adam's steps do not depend on the gradient's scale but through eps: a large one shows a wrong mean or clipping.
    overrides += ["optim.eps=1e-3", "engine.device=cpu"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    device, threads = choose_device(config.engine.device), torch.get_num_threads()
    start(device, config.engine.timeout)
    torch.set_num_threads(threads)
    method = build_method(config)
    micro = config.batch_size // accumulation

    def micro_step(step):
        images = torch.randint(0, 256, (micro, 32, 32, 3), dtype=torch.uint8)
        return images, method.draw(micro, config.seed, step)

    batches = [[micro_step(step * accumulation + i) for i in range(accumulation)] for step in range(len(RATES))]
    expected = plain_steps(config, method, batches)

    engine = build_engine(config, method, device, 1)
    for rates, micro_batches in zip(RATES, batches, strict=True):
        for batch in micro_batches:
            engine.backward(*batch)
            engine.step(*rates)
    for network, wanted in zip((method.encoder, method.predictor, method.target_encoder), expected):
        for (name, p), q in zip(network.named_parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("device", "asked", "given"),
    [("cpu", 50_000_000, CPU_BUCKET), ("cpu", 1000, 1000), ("cuda", 50_000_000, 50_000_000)],
)
def test_buckets_fit_the_device(device, asked, given):
    found = deepspeed_config(sections.Engine(bucket=asked), 0.0, 8, torch.device(device))
    assert found["zero_optimization"]["reduce_bucket_size"] == given
