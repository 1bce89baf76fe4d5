"""Relative errors against the golden archives of MAE and iBOT; called by tests/parity.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ijepa_fast.masks.crops import lay_out, teacher_temperature
from ijepa_fast.methods import ibot, mae
from tests.parity import RAW, patches_of, relative_error, weights
from tests.small import from_masks, setup_of


def parity_mae(archive) -> dict[str, float]:
    """Relative errors of an MAE archive: latents, predictions of masked patches, both losses, every gradient."""
    image, patch, dim, depth, heads, decoder_dim, decoder_depth, decoder_heads = map(int, archive["config"])
    sizes = (image, patch, dim, depth, heads, decoder_dim, decoder_depth)
    model = mae.MAE(setup_of(*sizes, mae.Options(), **RAW))
    # The archive's heads are not of the published width.
    model.decoder = mae.Decoder(model.encoder.grid, patch, dim, decoder_dim, decoder_depth, decoder_heads)
    encoder, decoder = model.encoder, model.decoder
    golden = weights(archive, "model")
    for network in (encoder, decoder):
        network.load_state_dict({name: golden[name] for name in network.state_dict()})
    images = torch.from_numpy(archive["images"])
    order = torch.from_numpy(archive["ids_restore"]).argsort(dim=1)
    visible = int((archive["mask"][0] == 0).sum())
    masked = order[:, visible:]
    draw = mae.with_decoder(from_masks(order[None, :, :visible], masked[None], encoder.patches))
    patches = patches_of(images, patch)

    latent = encoder.context(patches, draw)
    # The published prediction has its columns in order (i, j, c).
    predictions = torch.from_numpy(archive["pred"]).unflatten(2, (-1, 3)).transpose(2, 3).flatten(2)
    predictions = predictions[torch.arange(len(images))[:, None], masked].flatten(0, 1)
    errors = {
        "latent": relative_error(latent.view(archive["latent"].shape), archive["latent"]),
        "pred (masked patches)": relative_error(decoder(latent, draw), predictions),
    }
    for name, table in (("pos_embed", encoder.positions), ("decoder_pos_embed", decoder.positions)):
        errors[name] = relative_error(table, archive[f"model/{name}"][0, 1:])
    model.options.normalise = False
    errors["loss_pix"] = relative_error(model.loss_of_patches(patches, draw), archive["loss_pix"])
    model.options.normalise = True
    loss = model.loss_of_patches(patches, draw)
    errors["loss_norm_pix"] = relative_error(loss, archive["loss_norm_pix"])
    loss.backward()
    parameters = dict(encoder.named_parameters()) | dict(decoder.named_parameters())
    return errors | {
        key: relative_error(parameters[key.removeprefix("grad/")].grad, archive[key])
        for key in archive.files
        if key.startswith("grad/")
    }


def parity_ibot(archive) -> dict[str, float]:
    """Relative errors of an iBOT archive: logits, losses, centres, every gradient."""
    image, patch, dim, depth, heads, prototypes, hidden, bottleneck = map(int, archive["config"])
    options = ibot.Options(hidden=hidden, bottleneck=bottleneck, prototypes=prototypes, drop_path=0.0)
    model = ibot.IBOT(setup_of(image, patch, dim, depth, heads, options=options, **RAW))
    load_network(model.trained, archive, "student")
    load_network(model.averaged, archive, "teacher")
    model.carried["centre"] = torch.from_numpy(archive["center_before"])
    model.carried["patch_centre"] = torch.from_numpy(archive["center2_before"])[0]
    locals_ = [torch.from_numpy(archive[f"local{i}"]) for i in range(sum(k.startswith("local") for k in archive.files))]
    large = torch.cat([torch.from_numpy(archive[f"global{i}"]) for i in range(2)])
    large, small = patches_of(large, patch), patches_of(torch.cat(locals_), patch)
    mask = np.stack([archive[f"mask{i}"].reshape(len(archive["mask0"]), -1) for i in range(2)])
    # Epoch 5 of 10 of the warm-up.
    temperatures = ibot.Options.first_temperature, ibot.Options.temperature
    temperature = teacher_temperature(int(archive["epoch"]), 10 - 1, temperatures)
    small_side = locals_[0].shape[-1] // patch
    draw = lay_out(mask, model.encoder.grid, len(locals_), (small_side, small_side), temperature)

    masked = torch.from_numpy(mask).flatten(0, 1)
    class_logits, patch_logits = model.student(large, small, draw)
    teacher_classes, teacher_patches, patch_mean = model.teacher(large, draw)
    teacher_golden = torch.from_numpy(archive["teacher_patch"])
    errors = {
        "student_cls": relative_error(class_logits[: len(masked)], archive["student_cls"]),
        "student_local_cls": relative_error(class_logits[len(masked) :], archive["student_local_cls"]),
        "student_patch (masked)": relative_error(patch_logits, torch.from_numpy(archive["student_patch"])[masked]),
        "teacher_cls": relative_error(teacher_classes, archive["teacher_cls"]),
        "teacher_patch (masked)": relative_error(teacher_patches, teacher_golden[masked]),
        "teacher_patch (mean)": relative_error(patch_mean[0], teacher_golden.mean((0, 1))),
    }
    class_loss, patch_loss = model.losses(large, small, draw)
    (class_loss + patch_loss).backward()
    errors |= {
        "loss": relative_error(class_loss + patch_loss, archive["loss"]),
        "loss_cls": relative_error(class_loss, archive["loss_cls"]),
        "loss_patch": relative_error(patch_loss, archive["loss_patch"]),
        "center_after": relative_error(model.carried["centre"], archive["center_after"]),
        "center2_after": relative_error(model.carried["patch_centre"][None], archive["center2_after"]),
    }
    return errors | {
        key: relative_error(model.get_parameter(ours(key.removeprefix("grad/"))).grad, archive[key])
        for key in archive.files
        if key.startswith("grad/")
    }


def ours(name: str) -> str:
    """A parameter's name here, of the archive's."""
    return name.replace("backbone.", "encoder.", 1)


def load_network(networks: dict[str, nn.Module], archive, prefix: str) -> None:
    """Load a student or teacher; weight gains (all 1) and the second name of the shared head are left out."""
    names = {ours(k.removeprefix(prefix + "/")): k for k in archive.files if k.startswith(prefix + "/")}
    for network, module in networks.items():
        own = module.state_dict()
        golden = {k: torch.from_numpy(archive[names[f"{network}.{k}"]]) for k in own if f"{network}.{k}" in names}
        # The published teacher has no embedding of masked patches, and never needs one.
        if missing := set(own) - set(golden) - {"masked_embed"}:
            raise ValueError(f"{prefix}: the archive lacks {sorted(missing)} of {network}")
        module.load_state_dict(own | golden)
