"""What bench/throughput.py compares: one training step of a method, by implementation, on the same images and masks.

A contender is made from a `Case`. Its batches are put together ahead of the step, as a data loader would, and lie in
host memory (pinned for a GPU); the step's own time includes bringing them to the device.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bench.baselines import others, plain
from bench.baselines.case import Case
from bench.baselines.plain import PlainStep, load_published, plain_batch
from bench.baselines.plain_ibot import PlainIBOTStep
from bench.baselines.plain_mae import PlainMAEStep
from bench.baselines.plain_vit import normalise
from bench.baselines.steps import BareStep, EngineStep
from bench.baselines.strong import StrongStep
from ijepa_fast.data import IMAGENET_MEAN, IMAGENET_STD
from ijepa_fast.masks.crops import LARGE
from ijepa_fast.masks.packing import MaskDraw, pack
from ijepa_fast.masks.samplers import Masks
from ijepa_fast.methods import ibot, ijepa, mae
from ijepa_fast.methods.ibot import IBOT
from ijepa_fast.methods.ijepa import IJEPA
from ijepa_fast.methods.mae import MAE
from ijepa_fast.methods.method import METHODS as REGISTERED
from ijepa_fast.methods.method import Method
from ijepa_fast.models.flops import Transformer, Work

LR = 1e-4
FAST = ("fast", "fast-fp8", "fast-graphs", "fast-graphs-fp8")
BETAS = {"mae": (0.9, 0.95)}  # AdamW's, where not (.9, .999)
PLAIN_PARTS = (("backbone", "encoder"), ("head", "head"))  # of the plain iBOT's network, and this project's names


@dataclass
class Contender:
    """One implementation, ready to run.

    prepare: (images uint8 (B, H, W, 3), masks) -> a batch.
    step: one training step on a batch; evaluate: only its loss.
    network: what is trained; None where only the step as a whole may touch it (DeepSpeed).
    tokens: per image.
    work: GFLOP per image as published, the same for every implementation; executed: as computed here.
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
    draw = pack(masks, "truncate")
    context = draw.context_places.view(draw.contexts, draw.images, draw.context_max_seqlen)
    return context.long(), masks.target.long()


def make_contenders(
    case: Case, impls: list[str], contexts: list[str], external=None, engine=None, failures=None
) -> list[Contender]:
    """The contenders of a case, all with the same weights.

    Args:
        case: what is trained.
        impls: of fast (fp8: with the target encoder in fp8; graphs: forward and backward as CUDA graphs), strong,
            plain, published.
        contexts: of truncate, full, budget. Only `fast` can keep contexts of unequal length.
        external: checkout of the published code, for `published`.
        engine: ZeRO stage; each of this project's steps is a further contender through DeepSpeed.
        failures: a mapping that says why one cannot be made, by its name and context; without it that is raised.
    """
    contenders = []
    drawn = [(case.images(i), case.masks(i)) for i in range(case.batches)]
    for context in contexts if case.method == "ijepa" else contexts[:1]:
        for impl in impls:
            try:
                made = METHODS[case.method][0](case, [impl], [context], external, engine)
            except RuntimeError as error:
                if failures is None:
                    raise
                failures[impl, context] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                continue
            for contender in made:
                contender.batches = [_pin(contender.prepare(*pair), case.device) for pair in drawn]
            contenders += made
    return contenders


def work_of(case: Case, context: str = "full") -> tuple[float, float, float]:
    """Tokens, work as published and as executed here, per image; work in GFLOP. Only I-JEPA has a context to cut."""
    return METHODS[case.method][1](case, context)


def drawn(case: Case, make: Callable):
    """What `make` gives, its weights drawn on the case's device: on a CPU the largest models take 12 seconds each."""
    torch.manual_seed(case.seed)
    with torch.device(case.device):
        return make()


def _pin(value, device: str):
    """`value` with every tensor in it pinned, if it is to go to a GPU."""
    if not device.startswith("cuda"):
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_pin(x, device) for x in value)
    return value.pin_memory() if hasattr(value, "pin_memory") else value


def _fast(case: Case, impls: list[str], make: Callable[[], Method]) -> list[tuple[str, BareStep]]:
    """This project's steps among `impls`, each on a method of its own."""
    steps = []
    for impl in FAST:
        if impl in impls:
            options = {"compile": "fast" in case.compile, "fp8": "fp8" in impl, "graphs": "graphs" in impl}
            steps.append((impl, BareStep(make(), case, betas=BETAS.get(case.method, (0.9, 0.999)), **options)))
    return steps


def _ijepa(case: Case, impls, contexts, external, engine) -> list[Contender]:
    def make() -> IJEPA:
        return drawn(case, lambda: IJEPA(case.setup(ijepa.Options(loss="smooth_l1"))))

    contenders = []
    for context in contexts:
        facts = work_of(case, context)
        for impl, step in _fast(case, impls, make):
            prepare = partial(_packed_batch, context=context, case=case, padding="graphs" in impl)
            contenders.append(Contender(impl, context, prepare, step, step.loss, step.method, *facts))
            if engine is not None:
                options = {"fp8": "fp8" in impl, "graphs": "graphs" in impl}
                step = EngineStep(make(), case, engine, **options)
                contenders.append(Contender(f"{impl}, ZeRO {engine}", context, prepare, step, step.loss, None, *facts))
    if "truncate" not in contexts:
        return contenders
    count, work, _ = work_of(case, "truncate")
    networks = make().networks
    weights = [networks[name].state_dict() for name in ("encoder", "predictor", "target_encoder")]
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
    networks = drawn(case, lambda: (plain.Encoder(**case.sizes), plain.Predictor(**case.predictor_sizes)))
    if impl == "plain":
        return PlainStep(*networks, case.device, case.low_precision)
    compile = "blocks" if "strong-blocks" in case.compile else "whole" if "strong" in case.compile else None
    step = StrongStep(*networks, IMAGENET_MEAN, IMAGENET_STD, case.device, case.low_precision, compile)
    step.use_fastest_attention(case.batch, case.patches, case.sizes["dim"])
    return step


def _pack(masks: Masks, context: str, case: Case, padding: bool = False) -> MaskDraw:
    """`budget` keeps a quarter of the patches, a number every batch has."""
    return pack(masks, context, budget=case.patches // 4 if context == "budget" else None, padding=padding)


def _packed_batch(images, masks, context, case, padding=False):
    return images, _pack(masks, context, case, padding)


def _strong_batch(images, masks):
    return (images, *masks_at_equal_tokens(masks))


def _plain_batch(images, masks):
    return plain_batch(images, *masks_at_equal_tokens(masks), IMAGENET_MEAN, IMAGENET_STD)


def _stacks(case: Case) -> tuple[Transformer, Transformer]:
    """Sizes of the encoder, and of the predictor or decoder."""
    encoder, predictor = (Transformer(s["dim"], s["depth"], s["mlp_ratio"]) for s in (case.sizes, case.predictor_sizes))
    return encoder, predictor


def ijepa_work(case: Case, draw: MaskDraw) -> tuple[Work, Work]:
    """Work of a step on `draw`, as published and as executed here."""
    sizes = {
        "patch": case.patch,
        "patches": case.patches,
        "context": draw.context_lengths.tolist(),
        "targets": draw.targets,
        "target_size": draw.target_size,
        "images": draw.images,
    }
    published = ijepa.step_work(*_stacks(case), **sizes, embed_all=True)
    return published, ijepa.step_work(*_stacks(case), **sizes, unions=draw.union_lengths.tolist())


def _ijepa_work(case: Case, context: str) -> tuple[float, float, float]:
    draws = [_pack(case.masks(i), context, case) for i in range(case.batches)]
    works = [ijepa_work(case, draw) for draw in draws]
    images = case.batch * len(draws)
    published, executed = (sum(pair[i].total for pair in works) / images / 1e9 for i in (0, 1))
    return sum(draw.tokens for draw in draws) / images, published, executed


def _mae(case: Case, impls, contexts, external, engine) -> list[Contender]:
    def make() -> MAE:
        return drawn(case, lambda: MAE(case.setup(mae.Options())))

    facts = count, work, _ = work_of(case)
    contenders = [
        Contender(impl, "full", _mae_batch, step, step.loss, step.method, *facts)
        for impl, step in _fast(case, impls, make)
    ]
    if "plain" in impls:
        decoder = case.predictor_sizes
        sizes = case.sizes | {"decoder_dim": decoder["dim"], "decoder_depth": decoder["depth"]}
        sizes["decoder_heads"] = decoder["dim"] // mae.HEAD_DIM
        step = PlainMAEStep(sizes, case.device, case.low_precision)
        weights = {k: v for network in make().trained.values() for k, v in network.state_dict().items()}
        step.model.load_state_dict(step.model.state_dict() | weights)
        contenders.append(
            Contender("plain", "full", _plain_mae_batch, step, step.loss_of, step.model, count, work, work)
        )
    return contenders


def _mae_work(case: Case, context: str) -> tuple[float, float, float]:
    visible = case.patches - round(case.patches * mae.MASKED_SHARE)
    sizes = {"patch": case.patch, "patches": case.patches, "visible": visible}
    stacks = _stacks(case)
    executed = mae.step_work(*stacks, **sizes, embed_all=False, used_rows_only=True).total
    return 2 + visible + case.patches, mae.step_work(*stacks, **sizes).total / 1e9, executed / 1e9


def _mae_batch(images, masks):
    return images, mae.pack_visible(masks)


def _plain_mae_batch(images, masks):
    draw = mae.pack_visible(masks)
    order = draw.decoder_places.view(draw.images, -1).long()
    return normalise(images, IMAGENET_MEAN, IMAGENET_STD), order, draw.context_max_seqlen


def _ibot(case: Case, impls, contexts, external, engine) -> list[Contender]:
    def make() -> IBOT:
        return drawn(case, lambda: IBOT(case.setup(ibot.Options(**case.head))))

    facts = count, work, _ = work_of(case)
    contenders = [
        Contender(impl, "full", _crop_batch, step, step.loss, step.method, *facts)
        for impl, step in _fast(case, impls, make)
    ]
    if "plain" in impls:
        step, method = PlainIBOTStep(case.sizes, case.head, case.device, case.low_precision), make()
        weights = {
            f"{part}.{k}": v for part, name in PLAIN_PARTS for k, v in getattr(method, name).state_dict().items()
        }
        for side in (step.student, step.teacher):
            side.load_state_dict(weights)
        contenders.append(
            Contender("plain", "full", _plain_crop_batch, step, step.loss_of, step.student, count, work, work)
        )
    return contenders


def _ibot_work(case: Case, context: str) -> tuple[float, float, float]:
    drawn = [case.masks(i) for i in range(case.batches)]
    sizes = {"patch": case.patch, "global_patches": case.patches, "local_patches": drawn[0].small_patches}
    sizes |= {"images": case.batch, "locals_": drawn[0].small}
    encoder, head = _stacks(case)[0], ibot.HeadSizes(**case.head)
    masked = sum(int(batch.mask.sum()) for batch in drawn) // len(drawn)
    published = ibot.step_work(encoder, head, **sizes)
    executed = ibot.step_work(encoder, head, **sizes, masked=masked)
    scale = case.batch * 1e9
    return drawn[0].tokens / case.batch, published.total / scale, executed.total / scale


def _crop_batch(views, draw):
    return views, draw


def _plain_crop_batch(views, draw):
    views = [normalise(view, IMAGENET_MEAN, IMAGENET_STD) for view in views]
    masks = draw.mask.view(LARGE, draw.images, -1)
    return views[:LARGE], views[LARGE:], list(masks), draw.temperature


def _other(case: Case, impls, contexts, external, engine) -> list[Contender]:
    """Of a method that needs no word of its own."""
    facts = count, work, _ = others.work(case)
    steps = _fast(case, impls, lambda: others.make(case))
    contenders = [Contender(impl, "full", _as_drawn, step, step.loss, step.method, *facts) for impl, step in steps]
    if "plain" in impls:
        if case.method not in others.PLAIN:
            known = ", ".join(["ijepa", "mae", "ibot", *others.PLAIN])
            raise ValueError(f"--impl plain: there is no plain rendering of {case.method}; there are of {known}")
        plain = others.PLAIN[case.method]
        step = plain.step(case, others.make(case))
        network = step.student if hasattr(step, "student") else step.network
        contenders.append(Contender("plain", "full", plain.prepare, step, step.loss_of, network, count, work, work))
    return contenders


def _other_work(case: Case, context: str) -> tuple[float, float, float]:
    return others.work(case)


def _as_drawn(images, draw):
    return images, draw


METHODS = dict.fromkeys(REGISTERED, (_other, _other_work))
METHODS |= {"ijepa": (_ijepa, _ijepa_work), "mae": (_mae, _mae_work), "ibot": (_ibot, _ibot_work)}
