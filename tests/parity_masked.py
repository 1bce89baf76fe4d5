"""Relative errors against the golden archives of methods that hide patches; called by tests/parity.py."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch

from ijepa_fast.config import Optim
from ijepa_fast.engine.optim import decays
from ijepa_fast.engine.schedules import Schedule
from ijepa_fast.masks.blocks import lay_out
from ijepa_fast.methods import beit, cae, data2vec, simmim
from ijepa_fast.methods.method import Method
from ijepa_fast.models.relative import relative_index
from tests.parity import RAW, patches_of, relative_error
from tests.small import optimizer_of, setup_of


def config_of(archive) -> dict[str, Any]:
    """The archive's sizes and hyper-parameters."""
    return json.loads(str(archive["config"]))


def tensors(archive, prefix: str) -> dict[str, torch.Tensor]:
    """What the archive has under `prefix`."""
    return {k.removeprefix(prefix): torch.from_numpy(archive[k]) for k in archive.files if k.startswith(prefix)}


def load(module: torch.nn.Module, golden: dict[str, torch.Tensor]) -> None:
    """Load published names and shapes into `module`, all of its weights."""
    own = module.state_dict()
    names = {name: published(name) for name in own}
    module.load_state_dict({name: golden[names[name]].view_as(own[name]) for name in own})


def published(name: str) -> str:
    """An encoder's parameter by its published name."""
    return "mask_token" if name == "masked_embed" else name


def gradients(method: Method, archive, ours) -> dict[str, float]:
    """Errors of every gradient. ours: from a published name to the parameter's here."""
    errors = {}
    for name, golden in tensors(archive, "grad/").items():
        param = method.get_parameter(ours(name))
        errors[f"grad/{name}"] = relative_error(param.grad.view(golden.shape), golden)
    return errors


def rounding(method: Method, archive, names, ours) -> dict[str, float]:
    """Errors, beside the largest gradient of all, of gradients that are 0 but for rounding. names: in the archive."""
    scale = max(float(param.grad.abs().max()) for param in method.parameters())
    errors = {}
    for name in names:
        difference = method.get_parameter(ours(name)).grad - torch.from_numpy(archive[f"grad/{name}"])
        errors[f"grad/{name}"] = float(difference.abs().max()) / scale
    return errors


def set_sides(archive, config: dict[str, Any]) -> tuple[Any, ...]:
    """Positional sizes of setup_of."""
    return config["image"], config["patch"], config["dim"], config["depth"], config["heads"]


def index_error(archive, prefix: str, grid: tuple[int, int]) -> dict[str, float]:
    """Whether offsets are counted as published."""
    key = f"{prefix}rel_pos_bias.relative_position_index"
    return {key: relative_error(relative_index(grid), archive[key])}


def parity_simmim(archive) -> dict[str, float]:
    """Encoder, reconstruction, loss, every gradient, what is decayed."""
    config = config_of(archive)
    options = simmim.Options(
        masked=config["mask_ratio"],
        square=config["mask_patch"] // config["patch"],
        drop_path=0.0,
        layer_scale=config["layer_scale"],
        relative=config["shared_rpb"],
        absolute=config["ape"],
    )
    model = simmim.SimMIM(setup_of(*set_sides(archive, config), options=options, **RAW))
    load(model.encoder, tensors(archive, "model/encoder."))
    load(model.decoder, tensors(archive, "model/decoder.0."))
    mask = archive["mask"].reshape(len(archive["images"]), -1) > 0
    draw, drawn = lay_out(mask), model.draw(2, 0, 0)
    patches = patches_of(torch.from_numpy(archive["images"]), config["patch"])
    features = torch.from_numpy(archive["encoder_out"]).flatten(2).transpose(1, 2)
    pixels = patches_of(torch.from_numpy(archive["reconstruction"]), config["patch"])
    masked, size = torch.from_numpy(mask).flatten(), config["mask_patch"] // config["patch"]
    errors = index_error(archive, "model/encoder.", model.encoder.grid) if config["shared_rpb"] else {}
    errors |= {
        "encoder_out (masked)": relative_error(model.encoder.masked(patches, draw), features.flatten(0, 1)[masked]),
        "mask_count": relative_error(drawn.mask.view(2, -1).sum(1) / size**2, [int(archive["mask_count"])] * 2),
    }
    errors["reconstruction (masked)"] = relative_error(
        model.decoder(model.encoder.masked(patches, draw)), pixels[masked]
    )
    loss = model.loss_of_patches(patches, draw)
    loss.backward()
    errors["loss"] = relative_error(loss, archive["loss"])
    named = dict(model.named_parameters())
    kept = {name for name, param in named.items() if decays(name, param) and not decays(name, param, model.undecayed)}
    errors["no_weight_decay"] = float(kept != set(archive["no_weight_decay"].tolist()) & set(named))

    def ours(name: str) -> str:
        return name.replace("decoder.0.", "decoder.").replace("mask_token", "masked_embed")

    return errors | gradients(model, archive, ours)


def take_step(method: Method, config: dict[str, Any], ema: float = 0.0) -> torch.Tensor:
    """Clip all gradients together and step as the engine does, first step of a run. Returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(method.parameters(), config["clip"])
    optimizer = optimizer_of(method, lr=config["lr"], momentum=ema)
    for group in optimizer.param_groups:
        group["weight_decay"] = config["wd"] if group["decay"] else 0.0
    optimizer.step()
    return norm


def moved(archive, parts: dict[str, Callable[[str], torch.Tensor | None]]) -> dict[str, float]:
    """Errors of what the step moved. parts: by a prefix of the archive, from a published name to the tensor here."""
    errors = {}
    for prefix, ours in parts.items():
        for name, golden in tensors(archive, f"after/{prefix}").items():
            if (tensor := ours(name)) is not None:
                errors[f"after/{prefix}{name}"] = relative_error(tensor.view(golden.shape), golden)
    return errors


def masked_name(name: str) -> str:
    """A parameter of BEiT's and data2vec's one network by its name here."""
    if name.startswith("lm_head."):
        return name.replace("lm_head.", "head.")
    return "encoder." + name.replace("mask_token", "masked_embed")


def parity_data2vec(archive) -> dict[str, float]:
    """The average's blocks, targets, outputs, loss, every gradient, and the step.

    The published average has the head, too, which nothing reads: there is none of it here.
    """
    config = config_of(archive)
    options = data2vec.Options(
        masked=1,
        layers=len(config["target_layers"]),
        beta=config["l1_beta"],
        drop_path=0.0,
        layer_scale=config["layer_scale"],
    )
    model = data2vec.Data2Vec(setup_of(*set_sides(archive, config), options=options, **RAW))
    model.target_layers = config["target_layers"]
    load(model.encoder, tensors(archive, "model/"))
    load(model.averaged["encoder"], tensors(archive, "model_ema/"))
    load(model.head, tensors(archive, "model/lm_head."))
    mask = archive["bool_masked_pos"].reshape(len(archive["images"]), -1)
    draw, patches = lay_out(mask), patches_of(torch.from_numpy(archive["images"]), config["patch"])
    layers = model.averaged["encoder"].layers(patches, len(mask), config["depth"])
    golden = torch.from_numpy(archive["teacher_layers"]).flatten(1, 2)
    loss = model.loss_of_patches(patches, draw)
    loss.backward()
    schedule = Schedule(
        Optim(epochs=config["ema_start_at"], ema=config["ema_decay_init"], final_ema=config["ema_decay"]), 1
    )
    ema = schedule.ema_momentum(config["step"])
    errors = index_error(archive, "model/", model.encoder.grid) | {
        "teacher_layers": relative_error(torch.stack(layers), golden),
        "targets": relative_error(model.targets(patches, draw), archive["targets"]),
        "outputs": relative_error(model.predictions(patches, draw), archive["outputs"]),
        "loss": relative_error(loss, archive["loss"]),
        "ema_decay": relative_error(ema, archive["ema_decay"]),
    }
    errors |= gradients(model, archive, masked_name)
    errors["grad_norm"] = relative_error(take_step(model, config, ema), archive["grad_norm"])
    average = dict(model.averaged["encoder"].named_parameters())
    return errors | moved(
        archive,
        {
            "model/": lambda name: model.get_parameter(masked_name(name)),
            "model_ema/": lambda name: average.get(masked_name(name).removeprefix("encoder.")),
        },
    )


def parity_beit(archive) -> dict[str, float]:
    """Logits, loss, every gradient, and the step."""
    config = config_of(archive)
    options = beit.Options(vocabulary=config["vocab"], masked=1, drop_path=0.0, layer_scale=config["layer_scale"])
    model = beit.BEiT(setup_of(*set_sides(archive, config), options=options, **RAW))
    load(model.encoder, tensors(archive, "model/"))
    load(model.head, tensors(archive, "model/lm_head."))
    draw = lay_out(archive["bool_masked_pos"].reshape(len(archive["images"]), -1))
    patches = patches_of(torch.from_numpy(archive["images"]), config["patch"])
    loss = model.loss_of_patches(patches, torch.from_numpy(archive["tokens"]).flatten(), draw)
    loss.backward()
    errors = index_error(archive, "model/", model.encoder.grid) | {
        "logits": relative_error(model.logits(patches, draw), archive["logits"]),
        "loss": relative_error(loss, archive["loss"]),
    }
    errors |= gradients(model, archive, masked_name)
    errors["grad_norm"] = relative_error(take_step(model, config), archive["grad_norm"])
    return errors | moved(archive, {"model/": lambda name: model.get_parameter(masked_name(name))})


def cae_name(name: str) -> str:
    """A parameter of CAE's network by its name here."""
    moves = {
        "encoder_to_regresser_norm.": "regressor.embed_norm.",
        "encoder_to_regresser.": "regressor.embed.",
        "regresser.": "regressor.",
        "mask_token": "regressor.mask_token",
    }
    old = next((old for old in moves if name.startswith(old)), "")
    return moves.get(old, "") + name.removeprefix(old)


def parity_cae(archive) -> dict[str, float]:
    """Positions, encoder, latents and their targets, logits, both terms, every gradient, and the step."""
    config = config_of(archive)
    options = cae.Options(
        vocabulary=config["vocab"],
        masked=config["masked"],
        width=config["decoder_dim"],
        heads=config["decoder_heads"],
        regressor_depth=config["regressor_depth"],
        decoder_depth=config["decoder_depth"],
        alignment=config["align_loss_weight"],
        drop_path=0.0,
        layer_scale=config["layer_scale"],
    )
    model = cae.CAE(setup_of(*set_sides(archive, config), options=options, **RAW))
    golden = {cae_name(name): tensor for name, tensor in tensors(archive, "model/").items()}
    model.load_state_dict({name: golden[name] for name in model.state_dict()})
    lag = copy.deepcopy(model.encoder)  # of the first step alone: afterwards it is the encoder
    load(lag, tensors(archive, "model/alignment_encoder."))
    images, mask = torch.from_numpy(archive["images"]), archive["bool_masked_pos"]
    draw = cae.with_visible(lay_out(mask.reshape(len(images), -1)))
    patches, places = patches_of(images, config["patch"]), model.places(draw)
    visible = model.visible(patches, draw)
    latents, targets = model.latents(visible, draw, places), model.targets(patches, draw, encoder=lag)
    logits = model.decoder(latents, places[0], draw.images)
    model.targets = lambda patches, draw, keep: targets
    classes, squares = model.losses(patches, torch.from_numpy(archive["tokens"]).flatten(), draw)
    loss = classes + options.alignment * squares
    loss.backward()
    errors = {
        "pos_embed": relative_error(
            model.encoder._positions(model.encoder.grid)[None], archive["model/encoder.pos_embed"]
        ),
        "rd_pos_embed": relative_error(model.regressor.positions[None], archive["model/rd_pos_embed"][:, 1:]),
    }
    found = {"encoder_out": visible, "latent_predict": latents, "latent_target": targets, "logits": logits}
    found |= {"loss_main": classes, "loss_mse": squares, "loss_align": options.alignment * squares, "loss": loss}
    errors |= {name: relative_error(value.view(archive[name].shape), archive[name]) for name, value in found.items()}
    errors |= gradients(model, archive, cae_name)
    # What is added to all keys alike changes no attention.
    keys = [name for name in tensors(archive, "grad/") if name.endswith("norm1_k.bias")]
    errors |= rounding(model, archive, keys, cae_name)
    errors["grad_norm"] = relative_error(take_step(model, config), archive["grad_norm"])

    def ours(name: str) -> torch.Tensor:
        return model.get_parameter(cae_name(name.replace("alignment_encoder.", "encoder.")))

    return errors | moved(archive, {"model/": ours})
