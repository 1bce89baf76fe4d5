"""Relative errors against the golden archives of methods of several views; called by tests/parity.py."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import torch

from ijepa_fast.config import Optim
from ijepa_fast.engine.clipping import ClipEach, ClipTogether
from ijepa_fast.engine.partitions import Fragment, Partition
from ijepa_fast.engine.schedules import Schedule
from ijepa_fast.kernels.sigreg import sigreg
from ijepa_fast.kernels.sigreg.reference import knots
from ijepa_fast.masks import anchors
from ijepa_fast.masks.crops import LARGE, lay_out, teacher_temperature
from ijepa_fast.methods import dino, lejepa, msn
from ijepa_fast.methods.method import Method
from tests.parity import RAW, patches_of, relative_error
from tests.parity_masked import config_of, gradients, load, moved, rounding, set_sides, tensors
from tests.small import optimizer_of, setup_of


def clip_each(method: Method, largest: float) -> dict[str, torch.Tensor]:
    """Clip as the engine does at ZeRO 0. Returns the norms before, by name."""
    named = dict(method.named_parameters())
    norms = {name: param.grad.norm() for name, param in named.items()}
    parts = [Partition(p, [Fragment(name, 0, p.numel(), 0)], False) for name, p in named.items()]
    ClipEach(parts, True, largest, list(named))([*named.values()])
    return norms


def backbone(name: str) -> str:
    """A parameter of DINO's student by its name here."""
    return name.replace("backbone.", "encoder.")


def parity_dino(archive) -> dict[str, float]:
    """Positions, class tokens, logits, loss, centre, every gradient, clipping, schedules, and the step."""
    config = config_of(archive)
    options = dino.Options(
        small_crops=config["locals"],
        hidden=config["hidden"],
        bottleneck=config["bottleneck"],
        prototypes=config["out"],
        norm_last_layer=config["norm_last_layer"],
        drop_path=0.0,
    )
    model = dino.DINO(setup_of(*set_sides(archive, config), options=options, **RAW))
    for networks, prefix in ((model.trained, "student/"), (model.averaged, "teacher/")):
        load(networks["encoder"], tensors(archive, prefix + "backbone."))
        load(networks["head"], tensors(archive, prefix + "head."))
    model.carried["centre"] = torch.from_numpy(archive["center_before"].copy())
    crops = [torch.from_numpy(archive[f"crop{i}"]) for i in range(LARGE + config["locals"])]
    large, small = (patches_of(torch.cat(part), config["patch"]) for part in (crops[:LARGE], crops[LARGE:]))
    images, grid, small_side = len(crops[0]), model.encoder.grid, config["local"] // config["patch"]
    temperatures = config["warmup_teacher_temp"], config["teacher_temp"]
    # The published temperature reaches its end in the last epoch of its rise.
    rise = config["warmup_teacher_temp_epochs"] - 1
    temperature = teacher_temperature(config["epoch"], rise, temperatures)
    mask = np.zeros((LARGE, images, math.prod(grid)), dtype=bool)
    draw = lay_out(mask, grid, config["locals"], (small_side, small_side), temperature)

    student, teacher = model.student_tokens(large, small, draw), model.teacher_tokens(large, draw)
    heads = model.head, model.averaged["head"]
    outputs = [head.last_layer(head.bottleneck(x)) for head, x in zip(heads, (student, teacher), strict=True)]
    loss = model.loss_of_patches(large, small, draw)
    loss.backward()
    optim = Optim(epochs=10, warmup_epochs=2, start_lr=0, lr=5e-4, ema_shape="cosine")
    schedule = Schedule(optim, 3)
    steps = range(len(archive["schedule/momentum"]))
    published = [
        teacher_temperature(epoch, rise, temperatures) for epoch in range(len(archive["schedule/teacher_temp"]))
    ]
    errors = {
        "pos_local": relative_error(model.encoder._positions((small_side, small_side)), archive["pos_local"]),
        "student_cls": relative_error(student, archive["student_cls"]),
        "teacher_cls": relative_error(teacher, archive["teacher_cls"]),
        "student_out": relative_error(outputs[0], archive["student_out"]),
        "teacher_out": relative_error(outputs[1], archive["teacher_out"]),
        "teacher_temp": relative_error(temperature, archive["teacher_temp"]),
        "loss": relative_error(loss, archive["loss"]),
        "center_after": relative_error(model.carried["centre"], archive["center_after"]),
        "schedule/momentum": relative_error([schedule.ema_momentum(i) for i in steps], archive["schedule/momentum"]),
        "schedule/teacher_temp": relative_error(published, archive["schedule/teacher_temp"]),
    }
    errors |= gradients(model, archive, backbone)
    norms = clip_each(model, config["clip"])
    found = torch.stack([norms[backbone(name)] for name in archive["grad_names"].tolist()])
    errors["grad_norms"] = relative_error(found, archive["grad_norms"])
    for name, golden in tensors(archive, "clipped/").items():
        errors[f"clipped/{name}"] = relative_error(model.get_parameter(backbone(name)).grad, golden)
    optimizer = optimizer_of(model, lr=config["lr"], momentum=config["momentum"])
    for group in optimizer.param_groups:
        group["weight_decay"] = config["wd"] if group["decay"] else 0.0
    optimizer.step()
    averages = {f"{network}.{k}": p for network, m in model.averaged.items() for k, p in m.named_parameters()}
    after = {
        "student/": lambda name: model.get_parameter(backbone(name)),
        "teacher/": lambda name: averages[backbone(name)],
    }
    return errors | moved(archive, after)


def parity_sigreg(archive) -> dict[str, float]:
    """Relative errors of an archive of SIGReg and of LeJEPA's loss: each direction, values, gradients."""
    get = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "config"}
    config = json.loads(str(archive["config"]))
    errors: dict[str, float] = {}
    embeddings, directions = get["embeddings"].requires_grad_(), get["directions"]
    for number, (t_max, points) in enumerate(config["variants"]):
        name, values = f"v{number}", (float(t_max), int(points))
        for part, ours in zip(("t", "phi", "weights"), knots(*values), strict=True):
            errors[f"{name}/{part}"] = relative_error(ours, get[f"{name}/{part}"])
        slices = [sigreg(embeddings, column.contiguous(), *values) for column in directions.split(1, dim=1)]
        errors[f"{name}/per_slice"] = relative_error(torch.stack(slices), get[f"{name}/per_slice"])
        value = sigreg(embeddings, directions, *values)
        errors[f"{name}/value"] = relative_error(value, get[f"{name}/value"])
        (gradient,) = torch.autograd.grad(value, embeddings)
        errors[f"{name}/grad"] = relative_error(gradient, get[f"{name}/grad"])
    projections, directions = get["proj"].requires_grad_(), get["proj_directions"]
    chosen = lejepa.Options(weight=config["lamb"], knots=config["minimal_knots"], slices=config["minimal_slices"])
    model = lejepa.LeJEPA(setup_of(16, 8, options=replace(chosen, embedding=projections.shape[2]), **RAW))
    gaussian, agreement = model.terms(projections, directions)
    loss = config["lamb"] * gaussian + (1 - config["lamb"]) * agreement
    errors |= {
        "loss_sigreg": relative_error(gaussian, get["loss_sigreg"]),
        "loss_inv": relative_error(agreement, get["loss_inv"]),
        "loss": relative_error(loss, get["loss"]),
    }
    for name, value in (("sigreg", gaussian), ("loss", loss)):
        (gradient,) = torch.autograd.grad(value, projections, retain_graph=True)
        errors[f"dproj/{name}"] = relative_error(gradient, get[f"dproj/{name}"])
    return errors


# What batch norm makes of these is the same whatever they are: their gradients are 0 but for rounding.
WITHOUT_GRADIENT = ("norm.bias", "fc.fc1.bias", "fc.fc2.bias")


def msn_name(name: str) -> str:
    """A parameter of MSN's network, or its prototypes, by its name here."""
    if name == "prototypes":
        return "prototypes.weight"
    return name.replace("fc.", "head.", 1) if name.startswith("fc.") else f"encoder.{name}"


def parity_msn(archive) -> dict[str, float]:
    """Embeddings, targets, terms and their gradients, every gradient, running statistics, schedules, and the step."""
    config = config_of(archive)
    large, small = config["rand_views"], config["focal_views"]
    if config["focal"] == config["image"]:  # published: views are told by their size alone
        large, small = large + small, 0
    options = msn.Options(
        anchors=large,
        small_anchors=small,
        patch_drop=config["patch_drop"],
        hidden=config["hidden"],
        out=config["out"],
        prototypes=config["num_proto"],
        temperature=config["temperature"],
        sharpening=config["sharpen"],
        sinkhorn=msn.Options.sinkhorn if config["use_sinkhorn"] else 0,
        me_max=config["memax_weight"],
        entropy=config["ent_weight"],
    )
    model = msn.MSN(setup_of(*set_sides(archive, config), options=options, **RAW))
    for networks, prefix in ((model.trained, "encoder/"), (model.averaged, "target_encoder/")):
        load(networks["encoder"], tensors(archive, prefix))
        load(networks["head"], tensors(archive, prefix + "fc."))
    load(model.prototypes, {"weight": torch.from_numpy(archive["prototypes"])})
    network_of = {"head": "encoder", "target_head": "target_encoder"}
    kinds = {"mean": "running_mean", "variance": "running_var"}
    published_of = {
        f"{head}.{norm}.{kind}": f"{network}/fc.{norm}.{name}"
        for head, network in network_of.items()
        for norm in msn.NORMS
        for kind, name in kinds.items()
    }
    model.carried = {ours: torch.from_numpy(archive[name].copy()) for ours, name in published_of.items()}
    views = [torch.from_numpy(archive[f"view{i}"]) for i in range(1 + large + small)]
    patches = [patches_of(view, config["patch"]) for view in views]
    focal = torch.cat(patches[1 + large :]) if small else None
    side = config["image"] // config["patch"]
    kept = archive["kept_patches"] if config["patch_drop"] else np.arange(side**2)
    focal_side = config["focal"] // config["patch"]
    draw = anchors.lay_out(len(views[0]), kept, large, small, (side, side), (focal_side, focal_side))
    drawn = model.draw(2, 0, 0)

    embedding = model.target_embedding(patches[0], draw)
    found = model.anchor_embeddings(torch.cat(patches[1 : 1 + large]), focal, draw)
    found.retain_grad()
    targets = model.assignments(embedding)
    loss = model.loss_of(found, targets)[0]
    moved_statistics = dict(model.carried)
    errors = {
        "targets_embedding": relative_error(embedding, archive["targets_embedding"]),
        "anchors": relative_error(found, archive["anchors"]),
        "targets_before_sinkhorn": relative_error(model.sharpened(embedding), archive["targets_before_sinkhorn"]),
        "targets": relative_error(targets, archive["targets"]),
        "loss": relative_error(loss, archive["loss"]),
        "kept patches": relative_error(len(drawn.kept), len(kept)),
    }
    # Each term by itself: its value, and its gradient for the embeddings.
    weights = {"ploss": (0.0, 0.0), "me_max": (1.0, 0.0), "ent": (0.0, 1.0)}
    only = {}
    for name, (model.options.me_max, model.options.entropy) in weights.items():
        point = found.detach().requires_grad_()
        total, parts = model.loss_of(point, targets)
        (only[name],) = torch.autograd.grad(total, point)
        value = parts[{"ploss": "cross_entropy", "me_max": "me_max", "ent": "entropy"}[name]]
        errors[f"loss_{name}"] = relative_error(value, archive[f"loss_{name}"])
        gradient = only[name] if name == "ploss" else only[name] - only["ploss"]
        errors[f"dz/{name}"] = relative_error(gradient, archive[f"dz/{name}"])
    model.options.me_max, model.options.entropy = options.me_max, options.entropy
    loss.backward()
    errors |= gradients(model, archive, lambda name: msn_name(name.removeprefix("encoder/")))
    names = [f"encoder/{name}" for name in WITHOUT_GRADIENT]
    errors |= rounding(model, archive, names, lambda name: msn_name(name.removeprefix("encoder/")))
    for ours, name in published_of.items():
        errors[f"after/{name}"] = relative_error(moved_statistics[ours], archive[f"after/{name}"])
    schedule = Schedule(Optim(epochs=10, warmup_epochs=2, horizon=1.25), 3)
    steps = range(len(archive["schedule/lr"]))
    errors |= {
        "schedule/lr": relative_error([schedule.learning_rate(i) for i in steps], archive["schedule/lr"]),
        "schedule/wd": relative_error([schedule.decay(i) for i in steps], archive["schedule/wd"]),
        "lr": relative_error(schedule.learning_rate(0), archive["lr"]),
        "wd": relative_error(schedule.decay(0), archive["wd"]),
    }
    optimizer = optimizer_of(model, lr=float(archive["lr"]), momentum=config["momentum"])
    for group in optimizer.param_groups:
        group["weight_decay"] = float(archive["wd"]) if group["decay"] else 0.0
    clipped = [p.grad for group in optimizer.param_groups if group["clip"] for p in group["params"]]
    errors["grad_norm"] = relative_error(torch.stack([g.norm() for g in clipped]).norm(), archive["grad_norm"])
    optimizer.clip = ClipTogether(True, config["clip"], lambda: clipped)
    optimizer.step()
    averages = {f"{network}.{k}": p for network, m in model.averaged.items() for k, p in m.named_parameters()}

    def stays(name: str) -> bool:
        return "running" in name or name in WITHOUT_GRADIENT

    after = {
        "encoder/": lambda name: None if stays(name) else model.get_parameter(msn_name(name)),
        "target_encoder/": lambda name: None if stays(name) else averages[msn_name(name)],
        "prototypes": lambda name: model.prototypes.weight,
    }
    return errors | moved(archive, after)
