"""Relative errors against the archive of C-JEPA, I-JEPA with VICReg's terms; called by tests/parity.py.

The archive's total takes the mean over all patches as the target of the similarity, where this engine takes it over the
targets, which are all that it computes; so the total is put together here, of the engine's parts.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F

from ijepa_fast.kernels.target_loss import target_loss
from ijepa_fast.methods.ijepa import IJEPA, Options
from ijepa_fast.models.predictor import Predictor
from ijepa_fast.models.regulariser import off_diagonal, pooled_context, vicreg, weighted
from tests.parity import RAW, patches_of, relative_error, weights
from tests.small import from_masks, setup_of


def parity_cjepa(archive) -> dict[str, float]:
    """Features, every term, both readings of the context, the total and its gradients."""
    c = json.loads(str(archive["config"]))
    heads, width = c["heads"], 4 * c["heads"]  # a predictor of other heads takes the place of this one
    sizes = (c["image"], c["patch"], c["dim"], c["depth"], heads, width, 1)
    model = IJEPA(setup_of(*sizes, options=Options(loss="smooth_l1", regulariser="vicreg"), min_keep=1, **RAW))
    model.predictor = Predictor(model.encoder.grid, c["dim"], c["pred_dim"], c["pred_depth"], c["pred_heads"])
    networks = {"encoder": model.encoder, "predictor": model.predictor, "target_encoder": model.target_encoder}
    for name, network in networks.items():
        network.load_state_dict(weights(archive, name))
    get = {name: torch.from_numpy(archive[name]) for name in archive.files if archive[name].dtype.kind in "fi"}
    draw = from_masks(get["masks_context"], get["masks_target"], model.encoder.patches)
    patches = patches_of(get["images"], c["patch"])

    context = model.encoder.context(patches, draw)
    tokens = context.view(get["context_out"].shape)
    pooled = pooled_context(context, draw)
    with torch.no_grad():
        whole = model.target_encoder(patches, draw.images)
        target = F.layer_norm(whole, whole.shape[1:]).view(draw.images, -1, c["dim"]).mean(1)
        features = model.targets(patches, draw)
    predictions = model.predictor(context, draw)
    losses = {k: target_loss(predictions, features, draw.prediction_rows, kind=k) for k in ("smooth_l1", "l2")}
    terms = vicreg(pooled, target)
    of_target, of_tokens = vicreg(target, target), vicreg(context, context.detach())
    total = losses["smooth_l1"] + c["beta_vicreg"] * weighted(terms)
    both = c["beta_sim"] * terms["similarity"] + c["beta_cov"] * (terms["covariance"] + of_target["covariance"])
    both = both + c["beta_std"] * (terms["deviation"] + of_target["deviation"]) / 2
    ours = {
        "context_out": tokens,
        "context_mean": pooled,
        "target_mean": target,
        "predictions": predictions.view(get["predictions"].shape),
        "loss_jepa_smooth_l1": losses["smooth_l1"],
        "loss_jepa_mse": losses["l2"],
        "loss_sim": terms["similarity"],
        "loss_std_context": terms["deviation"],
        "loss_cov_context": terms["covariance"],
        "loss_std_target": of_target["deviation"],
        "loss_cov_target": of_target["covariance"],
        "loss_std_context_tokens": of_tokens["deviation"],
        "loss_cov_context_tokens": off_diagonal(context),
        "loss_total": total,
        "loss_total_both_branches": losses["smooth_l1"] + c["beta_vicreg"] * both,
    }
    errors = {name: relative_error(value, get[name]) for name, value in ours.items()}
    of = {"sim": terms["similarity"], "std_context": terms["deviation"], "cov_context": terms["covariance"]}
    for name, term in of.items():
        (gradient,) = torch.autograd.grad(term, pooled, retain_graph=True)
        errors[f"d_context_mean/{name}"] = relative_error(gradient, get[f"d_context_mean/{name}"])
    for name, term in (("std", of_tokens["deviation"]), ("cov", of_tokens["covariance"])):
        golden = get[f"d_context_out/{name}_context_tokens"]
        (gradient,) = torch.autograd.grad(term, context, retain_graph=True)
        errors[f"d_context_out/{name}_context_tokens"] = relative_error(gradient.view(golden.shape), golden)
    total.backward()
    for name in (name for name in get if name.startswith("grad/")):
        network, parameter = name.removeprefix("grad/").split("/")
        errors[name] = relative_error(networks[network].get_parameter(parameter).grad, get[name])
    return errors
