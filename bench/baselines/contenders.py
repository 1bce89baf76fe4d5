"""What bench/throughput.py compares: one training step of a method, by implementation, on the same images and masks.

A contender is made from a `Case`. Its batches are put together ahead of the step, as a data loader would, and lie in
host memory (pinned for a GPU); the step's own time includes bringing them to the device.
"""

from __future__ import annotations

import copy
import importlib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bench.baselines import plain
from bench.baselines.case import Case
from bench.baselines.plain import PlainStep, load_published, plain_batch
from bench.baselines.plain_ibot import PlainIBOTStep
from bench.baselines.plain_mae import PlainMAEStep
from bench.baselines.plain_vit import normalise
from bench.baselines.steps import BareStep, EngineStep
from bench.baselines.strong import StrongStep
from ijepa_fast.data import IMAGENET_MEAN, IMAGENET_STD
from ijepa_fast.masks.crops import LARGE
from ijepa_fast.masks.packing import PackedBatch, pack
from ijepa_fast.masks.samplers import Masks
from ijepa_fast.methods import ibot, mae
from ijepa_fast.methods.ijepa import IJEPA
from ijepa_fast.models import flops
from ijepa_fast.models.flops import Head, Transformer
from ijepa_fast.models.predictor import Predictor
from ijepa_fast.models.vit import Encoder

LR = 1e-4
FAST = ("fast", "fast-fp8", "fast-graphs", "fast-graphs-fp8")


@dataclass
class Contender:
    """One implementation, ready to run.

    prepare: (images uint8 (B, H, W, 3), masks) -> a batch.
    step: one training step on a batch; evaluate: only its loss.
    network: what is trained; None where only the step as a whole may touch it (DeepSpeed).
    tokens: an image.
    work: GFLOP an image as published, the same for every implementation; executed: as computed here.
    """

    name: str
    context: str
    prepare: Callable
    step: Callable
    evaluate: Callable
    network: nn.Module | None
    tokens: float
    work: float
    executed: float
    batches: list = field(default_factory=list)

    def run(self, i: int):
        """Step `i`, on the batches prepared ahead in turn."""
        return self.step(self.batches[i % len(self.batches)], lr=LR)

    def fingerprint(self) -> tuple[float, float]:
        """The loss of the first batch and the norm of its gradient to the patch embedding, nothing dropped at random.

        Fresh weights predict next to nothing, so the loss alone would hide most errors.
        """
        weight = next(p for n, p in self.network.named_parameters() if n.endswith("patch_embed.proj.weight"))
        self.network.eval()
        loss = self.evaluate(self.batches[0])
        (gradient,) = torch.autograd.grad(loss, weight)
        self.network.train()
        return loss.item(), gradient.float().norm().item()


def published_networks(case: Case, path: str | Path):
    """Encoder and predictor of a checkout of the published I-JEPA code; the plain step is their training loop too."""
    checkout = Path(path)
    if not (checkout / "src" / "helper.py").is_file():
        raise ValueError(
            f"--external: expected a checkout of the published I-JEPA code, with src/helper.py, got {path}"
        )
    sys.path.insert(0, str(checkout.resolve()))
    try:
        helper = importlib.import_module("src.helper")
    finally:
        sys.path.pop(0)
    predictor = case.predictor_sizes
    logging.disable(logging.INFO)  # it prints the whole model
    try:
        return helper.init_model(
            device=torch.device(case.device),
            patch_size=case.patch,
            model_name=case.arch,
            crop_size=case.crop,
            pred_depth=predictor["depth"],
            pred_emb_dim=predictor["dim"],
        )
    finally:
        logging.disable(logging.NOTSET)


def masks_at_equal_tokens(masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
    """The published rectangular masks, context (C, B, Kc) and target (M, B, K) int64, contexts cut to the shortest."""
    packed = pack(masks, "truncate")
    length = packed.context_max_seqlen
    context = packed.context_index.view(packed.contexts, packed.images, length) % packed.patches
    return context.long(), masks.target.long()


def make_contenders(case: Case, impls: list[str], contexts: list[str], external=None, engine=None) -> list[Contender]:
    """The contenders of a case, all with the same weights.

    Args:
        case: what is trained.
        impls: of fast (fp8: with the target encoder in fp8; graphs: forward and backward as CUDA graphs), strong,
            plain, published.
        contexts: of truncate, full, budget. Only `fast` can keep contexts of unequal length.
        external: checkout of the published code, for `published`.
        engine: ZeRO stage; each of this project's steps is a further contender through DeepSpeed.
    """
    contenders = METHODS[case.method][0](case, impls, contexts, external, engine)
    drawn = [(case.images(i), case.masks(i)) for i in range(case.batches)]
    for contender in contenders:
        contender.batches = [_pin(contender.prepare(*pair), case.device) for pair in drawn]
    return contenders


def work_of(case: Case, context: str = "full") -> tuple[float, float, float]:
    """Tokens, work as published and as executed here, of an image; work in GFLOP. Only I-JEPA has a context to cut."""
    return METHODS[case.method][1](case, context)


def _pin(value, device: str):
    """`value` with every tensor in it pinned, if it is to go to a GPU."""
    if not device.startswith("cuda"):
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_pin(x, device) for x in value)
    return value.pin_memory() if hasattr(value, "pin_memory") else value


def _ijepa(case: Case, impls, contexts, external, engine) -> list[Contender]:
    torch.manual_seed(case.seed)
    weights = [{k: v.clone() for k, v in n.state_dict().items()} for n in _networks(_ijepa_objective(case))]
    contenders = []
    for context in contexts:
        facts = work_of(case, context)
        prepare = partial(_packed_batch, context=context, case=case)
        for impl in FAST:
            if impl in impls:
                graphs = "graphs" in impl
                options = {"compile": "fast" in case.compile, "fp8": "fp8" in impl, "graphs": graphs}
                step = BareStep(_ijepa_objective(case, weights), case, **options)
                made = partial(prepare, ladder=graphs)
                contenders.append(Contender(impl, context, made, step, step.loss, step.objective, *facts))
                if engine is not None:
                    options = {"fp8": "fp8" in impl, "graphs": graphs}
                    step = EngineStep(_ijepa_objective(case, weights), case, engine, **options)
                    name = f"{impl}, ZeRO {engine}"
                    contenders.append(Contender(name, context, made, step, step.loss, None, *facts))
    if "truncate" not in contexts:
        return contenders
    count, work, _ = work_of(case, "truncate")
    for impl in ("strong", "published", "plain"):
        if impl not in impls:
            continue
        step = _opponent(case, impl, external)
        load_published(step, *weights)
        prepare = _strong_batch if impl == "strong" else _plain_batch
        contenders.append(Contender(impl, "truncate", prepare, step, step.loss_of, step.encoder, count, work, work))
    return contenders


def _opponent(case: Case, impl: str, external: str | None):
    if impl == "published":
        return PlainStep(*published_networks(case, external), case.device, case.low_precision)
    networks = plain.Encoder(**case.sizes), plain.Predictor(**case.predictor_sizes)
    if impl == "plain":
        return PlainStep(*networks, case.device, case.low_precision)
    compile = "blocks" if "strong-blocks" in case.compile else "whole" if "strong" in case.compile else None
    step = StrongStep(*networks, IMAGENET_MEAN, IMAGENET_STD, case.device, case.low_precision, compile)
    step.use_fastest_attention(case.batch, case.patches, case.sizes["dim"])
    return step


def _pack(masks: Masks, context: str, case: Case, ladder: bool = False) -> PackedBatch:
    """`budget` keeps a quarter of the patches, a number every batch has."""
    return pack(masks, context, budget=case.patches // 4 if context == "budget" else None, ladder=ladder)


def _packed_batch(images, masks, context, case, ladder=False):
    return images, _pack(masks, context, case, ladder)


def _strong_batch(images, masks):
    return (images, *masks_at_equal_tokens(masks))


def _plain_batch(images, masks):
    return plain_batch(images, *masks_at_equal_tokens(masks), IMAGENET_MEAN, IMAGENET_STD)


def _networks(objective: IJEPA):
    return objective.encoder, objective.predictor, objective.target_encoder


def _ijepa_objective(case: Case, weights=None) -> IJEPA:
    objective = IJEPA(
        Encoder(**case.sizes),
        Predictor(**case.predictor_sizes),
        loss="smooth_l1",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    for network, state in zip(_networks(objective), weights or ()):
        network.load_state_dict(state)
    return objective


def _ijepa_work(case: Case, context: str) -> tuple[float, float, float]:
    batches = [_pack(case.masks(i), context, case) for i in range(case.batches)]
    encoder, predictor = (
        Transformer(sizes["dim"], sizes["depth"], sizes["mlp_ratio"]) for sizes in (case.sizes, case.predictor_sizes)
    )
    sums = [0, 0, 0]
    for packed in batches:
        sizes = {
            "patch": case.patch,
            "patches": case.patches,
            "context": packed.context_lengths.tolist(),
            "targets": packed.targets,
            "target_size": packed.target_size,
            "images": packed.images,
        }
        published = flops.ijepa(encoder, predictor, **sizes, embed_all=True).total
        executed = flops.ijepa(encoder, predictor, **sizes, unions=packed.union_cu_seqlens.diff().tolist()).total
        sums = [a + b for a, b in zip(sums, (packed.tokens, published, executed))]
    images = case.batch * len(batches)
    return sums[0] / images, sums[1] / images / 1e9, sums[2] / images / 1e9


def _mae(case: Case, impls, contexts, external, engine) -> list[Contender]:
    torch.manual_seed(case.seed)
    encoder = mae.ClassTokenEncoder(**case.sizes)
    depth = case.predictor_depth or 8
    decoder = mae.Decoder(encoder.grid, case.patch, encoder.dim, depth=depth)
    objective = mae.MAE(encoder, decoder, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    weights = {k: v.clone() for k, v in (encoder.state_dict() | decoder.state_dict()).items()}
    count, work, own = work_of(case)
    contenders = []
    for impl in ("fast", "fast-graphs"):
        if impl in impls:
            options = {"compile": "fast" in case.compile, "graphs": "graphs" in impl}
            own_objective = copy.deepcopy(objective)
            step = BareStep(own_objective, case, betas=(0.9, 0.95), average=False, **options)
            contenders.append(Contender(impl, "full", _mae_batch, step, step.loss, own_objective, count, work, own))
    if "plain" in impls:
        step = PlainMAEStep(case.sizes | {"decoder_depth": depth}, case.device, case.low_precision)
        step.model.load_state_dict(step.model.state_dict() | weights)
        contenders.append(
            Contender("plain", "full", _plain_mae_batch, step, step.loss_of, step.model, count, work, work)
        )
    return contenders


def _mae_work(case: Case, context: str) -> tuple[float, float, float]:
    visible = case.patches - round(case.patches * mae.MASKED_SHARE)
    sizes = {"patch": case.patch, "patches": case.patches, "visible": visible}
    encoder = Transformer(case.sizes["dim"], case.sizes["depth"], case.sizes["mlp_ratio"])
    stacks = encoder, Transformer(512, case.predictor_depth or 8)
    executed = flops.mae(*stacks, **sizes, embed_all=False, used_rows_only=True).total
    return 2 + visible + case.patches, flops.mae(*stacks, **sizes).total / 1e9, executed / 1e9


def _mae_batch(images, masks):
    return images, pack(masks)


def _plain_mae_batch(images, masks):
    packed = pack(masks)
    visible = packed.context_index.view(packed.images, -1) % packed.patches
    order = torch.cat([visible, masks.target[0]], dim=1).long()
    return normalise(images, IMAGENET_MEAN, IMAGENET_STD), order, visible.shape[1]


def _ibot(case: Case, impls, contexts, external, engine) -> list[Contender]:
    torch.manual_seed(case.seed)
    network = ibot.Network(
        ibot.Backbone(**case.sizes, drop=ibot.Options.drop_path), ibot.Head(case.sizes["dim"], **case.head)
    )
    objective = ibot.IBOT(network, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    count, work, own = work_of(case)
    contenders = []
    if "fast" in impls:
        step = BareStep(objective, case, compile="fast" in case.compile)
        contenders.append(Contender("fast", "full", _crop_batch, step, step.loss, objective, count, work, own))
    if "plain" in impls:
        step = PlainIBOTStep(case.sizes, case.head, case.device, case.low_precision)
        for side in (step.student, step.teacher):
            side.load_state_dict(weights)
        contenders.append(
            Contender("plain", "full", _plain_crop_batch, step, step.loss_of, step.student, count, work, work)
        )
    return contenders


def _ibot_work(case: Case, context: str) -> tuple[float, float, float]:
    drawn = [case.masks(i) for i in range(case.batches)]
    sizes = {"patch": case.patch, "global_patches": case.patches, "local_patches": drawn[0].small_side ** 2}
    sizes |= {"images": case.batch, "locals_": drawn[0].small}
    encoder, head = Transformer(case.sizes["dim"], case.sizes["depth"], case.sizes["mlp_ratio"]), Head(**case.head)
    masked = sum(int(batch.mask.sum()) for batch in drawn) // len(drawn)
    published, executed = flops.ibot(encoder, head, **sizes), flops.ibot(encoder, head, **sizes, masked=masked)
    scale = case.batch * 1e9
    return drawn[0].tokens / case.batch, published.total / scale, executed.total / scale


def _crop_batch(views, crops):
    return views, crops


def _plain_crop_batch(views, crops):
    views = [normalise(view, IMAGENET_MEAN, IMAGENET_STD) for view in views]
    masks = crops.mask.view(LARGE, crops.images, -1)
    return views[:LARGE], views[LARGE:], list(masks), crops.temperature


METHODS = {"ijepa": (_ijepa, _ijepa_work), "mae": (_mae, _mae_work), "ibot": (_ibot, _ibot_work)}
