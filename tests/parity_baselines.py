"""Relative errors against the golden archives of MAE and iBOT; called by tests/parity.py."""

from __future__ import annotations

import numpy as np
import torch

from ijepa_fast.masks.crops import lay_out, teacher_temperature
from ijepa_fast.masks.packing import from_masks
from ijepa_fast.methods.ibot import IBOT, Backbone, Head, Network, Options
from ijepa_fast.methods.mae import MAE, ClassTokenEncoder, Decoder
from tests.parity import patches_of, relative_error, weights


def parity_mae(archive) -> dict[str, float]:
    """Relative errors of an MAE archive: latents, predictions of masked patches, both losses, every gradient."""
    image, patch, dim, depth, heads, decoder_dim, decoder_depth, decoder_heads = map(int, archive["config"])
    encoder = ClassTokenEncoder(image, patch, dim, depth, heads)
    decoder = Decoder(encoder.grid, patch, dim, decoder_dim, decoder_depth, decoder_heads)
    model = MAE(encoder, decoder, mean=(0, 0, 0), std=(1, 1, 1))
    golden = weights(archive, "model")
    for network in (encoder, decoder):
        network.load_state_dict({name: golden[name] for name in network.state_dict()})
    images = torch.from_numpy(archive["images"])
    order = torch.from_numpy(archive["ids_restore"]).argsort(dim=1)
    visible = int((archive["mask"][0] == 0).sum())
    masked = order[:, visible:]
    packed = from_masks(order[None, :, :visible], masked[None], encoder.patches)
    patches = patches_of(images, patch)

    latent = encoder.context(patches, packed)
    # The published prediction has its columns in order (i, j, c).
    predictions = torch.from_numpy(archive["pred"]).unflatten(2, (-1, 3)).transpose(2, 3).flatten(2)
    predictions = predictions[torch.arange(len(images))[:, None], masked].flatten(0, 1)
    errors = {
        "latent": relative_error(latent.view(archive["latent"].shape), archive["latent"]),
        "pred (masked patches)": relative_error(decoder(latent, packed), predictions),
    }
    for name, table in (("pos_embed", encoder.positions), ("decoder_pos_embed", decoder.positions)):
        errors[name] = relative_error(table, archive[f"model/{name}"][0, 1:])
    model.normalise = False
    errors["loss_pix"] = relative_error(model.loss_of_patches(patches, packed), archive["loss_pix"])
    model.normalise = True
    loss = model.loss_of_patches(patches, packed)
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
    network = Network(Backbone(image, patch, dim, depth, heads), Head(dim, hidden, bottleneck, prototypes))
    model = IBOT(network, mean=(0, 0, 0), std=(1, 1, 1))
    load_network(model.encoder, archive, "student")
    load_network(model.target_encoder, archive, "teacher")
    model.carried["centre"] = torch.from_numpy(archive["center_before"])
    model.carried["patch_centre"] = torch.from_numpy(archive["center2_before"])[0]
    locals_ = [torch.from_numpy(archive[f"local{i}"]) for i in range(sum(k.startswith("local") for k in archive.files))]
    large = torch.cat([torch.from_numpy(archive[f"global{i}"]) for i in range(2)])
    large, small = patches_of(large, patch), patches_of(torch.cat(locals_), patch)
    mask = np.stack([archive[f"mask{i}"].reshape(len(archive["mask0"]), -1) for i in range(2)])
    # Epoch 5 of 10 of the warm-up.
    temperatures = Options.first_temperature, Options.temperature
    temperature = teacher_temperature(int(archive["epoch"]), 10 - 1, temperatures)
    batch = lay_out(mask, len(locals_), locals_[0].shape[-1] // patch, temperature)

    masked = torch.from_numpy(mask).flatten(0, 1)
    class_logits, patch_logits = model.encoder.student(large, small, batch)
    teacher_classes, teacher_patches, patch_mean = model.target_encoder.teacher(large, batch)
    teacher_golden = torch.from_numpy(archive["teacher_patch"])
    errors = {
        "student_cls": relative_error(class_logits[: len(masked)], archive["student_cls"]),
        "student_local_cls": relative_error(class_logits[len(masked) :], archive["student_local_cls"]),
        "student_patch (masked)": relative_error(patch_logits, torch.from_numpy(archive["student_patch"])[masked]),
        "teacher_cls": relative_error(teacher_classes, archive["teacher_cls"]),
        "teacher_patch (masked)": relative_error(teacher_patches, teacher_golden[masked]),
        "teacher_patch (mean)": relative_error(patch_mean[0], teacher_golden.mean((0, 1))),
    }
    class_loss, patch_loss = model.losses(large, small, batch)
    (class_loss + patch_loss).backward()
    errors |= {
        "loss": relative_error(class_loss + patch_loss, archive["loss"]),
        "loss_cls": relative_error(class_loss, archive["loss_cls"]),
        "loss_patch": relative_error(patch_loss, archive["loss_patch"]),
        "center_after": relative_error(model.carried["centre"], archive["center_after"]),
        "center2_after": relative_error(model.carried["patch_centre"][None], archive["center2_after"]),
    }
    return errors | {
        key: relative_error(model.encoder.get_parameter(key.removeprefix("grad/")).grad, archive[key])
        for key in archive.files
        if key.startswith("grad/")
    }


def load_network(network: Network, archive, prefix: str) -> None:
    """Load a student or teacher; weight gains (all 1) and the second name of the shared head are left out."""
    golden = {k.removeprefix(prefix + "/"): archive[k] for k in archive.files if k.startswith(prefix + "/")}
    own = network.state_dict()
    # The published teacher has no embedding of masked patches, and never needs one.
    network.load_state_dict(own | {name: torch.from_numpy(golden[name]) for name in own if name in golden})
    missing = set(own) - set(golden) - {"backbone.masked_embed"}
    if missing:
        raise ValueError(f"{prefix}: the archive lacks {sorted(missing)}")
