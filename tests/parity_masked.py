"""Relative errors against the golden archives of methods that hide patches; called by tests/parity.py."""

from __future__ import annotations

import json
from typing import Any

import torch

from ijepa_fast.engine.optim import decays
from ijepa_fast.masks.blocks import lay_out
from ijepa_fast.methods import simmim
from ijepa_fast.methods.method import Method
from ijepa_fast.models.relative import relative_index
from tests.parity import RAW, patches_of, relative_error
from tests.small import setup_of


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


def set_sides(archive, config: dict[str, Any]) -> tuple[Any, ...]:
    """Positional sizes of setup_of."""
    return config["image"], config["patch"], config["dim"], config["depth"], config["heads"]


def index_error(archive, prefix: str, side: int) -> dict[str, float]:
    """Whether offsets are counted as published."""
    key = f"{prefix}rel_pos_bias.relative_position_index"
    return {key: relative_error(relative_index(side), archive[key])}


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
    errors = index_error(archive, "model/encoder.", model.encoder.side) if config["shared_rpb"] else {}
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
