"""Relative errors against the golden archives of MAE and iBOT; called by tests/parity.py."""

from __future__ import annotations

import torch

from bench.baselines.mae import MAE, ClassTokenEncoder, Decoder
from ijepa_fast.packing import from_masks
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
