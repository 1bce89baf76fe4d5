"""Compare this project with the golden numbers of a published implementation.

    python tests/parity.py FILE.npz

rebuilds the model from the archive's `config`, runs its steps in fp32 on the CPU, and prints the largest relative error
(largest absolute difference over largest absolute value) of every quantity. Exit status 0 when all are under 1e-4.
The archive's method is told by its `config`; of I-JEPA, MAE and iBOT by its keys.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ijepa_fast.config import Optim
from ijepa_fast.engine.schedules import Schedule
from ijepa_fast.kernels.target_loss import target_loss
from ijepa_fast.methods.ijepa import IJEPA, Options
from tests.small import from_masks, optimizer_of, setup_of

TOLERANCE = 1e-4
STEPS = 3
RAW = {"mean": (0, 0, 0), "std": (1, 1, 1)}  # the archives' images are normalised


def relative_error(ours, golden) -> float:
    """Largest absolute difference over golden's largest absolute value; infinite for a wrong shape or NaN."""
    ours = ours.detach().double() if isinstance(ours, torch.Tensor) else torch.tensor(ours, dtype=torch.float64)
    golden = torch.as_tensor(golden).double()
    if ours.shape != golden.shape or not ours.isfinite().all():
        return float("inf")
    scale = golden.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((ours - golden).abs().max() / scale).item()


def weights(archive, prefix: str) -> dict[str, torch.Tensor]:
    """The state dict stored under `prefix`/, without the position tables (they are not learned)."""
    names = [key for key in archive.files if key.startswith(prefix + "/") and not key.endswith("pos_embed")]
    return {name.removeprefix(prefix + "/"): torch.from_numpy(archive[name]) for name in names}


def patches_of(images: torch.Tensor, patch: int) -> torch.Tensor:
    """Float images (B, 3, H, W) -> patches (B*N, 3*P*P) in the layout of kernels/patchify."""
    return F.unfold(images, patch, stride=patch).transpose(1, 2).flatten(0, 1).contiguous()


def build(archive) -> tuple[IJEPA, Schedule]:
    """The model with the archive's first weights, and its schedule."""
    image, patch, dim, depth, heads, predictor_dim, predictor_depth, _, _, iterations, epochs, warmup = map(
        int, archive["config"]
    )
    sizes = (image, patch, dim, depth, heads, predictor_dim, predictor_depth)
    model = IJEPA(setup_of(*sizes, Options(loss="smooth_l1"), mean=(0, 0, 0), std=(1, 1, 1), min_keep=1))
    model.encoder.load_state_dict(weights(archive, "init/encoder"))
    model.predictor.load_state_dict(weights(archive, "init/predictor"))
    model.target_encoder.load_state_dict(weights(archive, "init/target_encoder"))
    return model, Schedule(Optim(epochs=epochs, warmup_epochs=warmup, horizon=1.25), iterations)


def parity_ijepa(archive) -> dict[str, float]:
    """Relative errors of every quantity of an I-JEPA archive, by name."""
    errors: dict[str, float] = {}
    model, schedule = build(archive)
    for name, table in (("encoder", model.encoder), ("predictor", model.predictor)):
        key = f"init/{name}/" + ("pos_embed" if name == "encoder" else "predictor_pos_embed")
        if key in archive.files:
            errors[f"positions/{name}"] = relative_error(table.positions[None], archive[key])
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        golden = {key: archive[f"s{step}/{key}"] for key in STEP_KEYS}
        patches = patches_of(torch.from_numpy(golden["images"]), model.encoder.patch)
        draw = from_masks(golden["masks_context"], golden["masks_target"], model.encoder.patches)
        ours = run_step(model, patches, draw)
        ours |= {"lr": schedule.learning_rate(step), "wd": schedule.decay(step), "ema": schedule.ema_momentum(step)}
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = ours["lr"], ours["ema"]
            group["weight_decay"] = ours["wd"] if group["decay"] else 0.0
        for key in STEP_KEYS[3:]:
            value = ours[key].reshape(golden[key].shape) if isinstance(ours[key], torch.Tensor) else ours[key]
            errors[f"s{step}/{key}"] = relative_error(value, golden[key])
        for key in [key for key in archive.files if key.startswith(f"s{step}/grad/")]:
            network, name = key.removeprefix(f"s{step}/grad/").split("/")
            errors[key] = relative_error(getattr(model, network).get_parameter(name).grad, archive[key])
        optimizer.step()
        optimizer.zero_grad()
    for network in ("encoder", "predictor", "target_encoder"):
        state = getattr(model, network).state_dict()
        for name, value in weights(archive, f"final/{network}").items():
            errors[f"final/{network}/{name}"] = relative_error(state[name], value)
    for key, function in (("lr", schedule.learning_rate), ("wd", schedule.decay), ("ema", schedule.ema_momentum)):
        golden = archive[f"schedule/{key}"]
        errors[f"schedule/{key}"] = relative_error([function(i) for i in range(len(golden))], golden)
    return errors


STEP_KEYS = ("images", "masks_context", "masks_target", "target_encoder_out", "targets", "context_out", "predictions")
STEP_KEYS += ("loss_smooth_l1", "loss_mse", "lr", "wd", "ema")


def run_step(model: IJEPA, patches: torch.Tensor, draw) -> dict[str, torch.Tensor]:
    """Forward and backward of one step, with every intermediate the archive holds."""
    with torch.no_grad():
        features = model.target_encoder.targets(patches, draw)
        targets = F.layer_norm(features, features.shape[-1:])[draw.prediction_rows]
        predictions = model.predictor(model.encoder.context(patches, draw), draw)
        mse = target_loss(predictions, features, draw.prediction_rows, kind="l2")
    loss = model.loss_of_patches(patches, draw)
    loss.backward()
    return {
        "target_encoder_out": model.target_encoder(patches, draw.images),
        "context_out": model.encoder.context(patches, draw),
        "targets": targets,
        "predictions": predictions,
        "loss_smooth_l1": loss,
        "loss_mse": mse,
    }


def parity(path: str | Path) -> dict[str, float]:
    """Relative errors of every quantity of the archive at `path`, by name."""
    with np.load(path) as archive:
        if "s0/masks_context" in archive.files:
            return parity_ijepa(archive)
        from tests.parity_masked import parity_beit, parity_cae, parity_data2vec, parity_simmim
        from tests.parity_methods import parity_ibot, parity_mae
        from tests.parity_regulariser import parity_cjepa
        from tests.parity_views import parity_dino, parity_msn, parity_sigreg

        if archive["config"].dtype.kind == "U":
            known = {"simmim": parity_simmim, "data2vec": parity_data2vec, "beit": parity_beit, "dino": parity_dino}
            known |= {"msn": parity_msn, "cae": parity_cae, "sigreg": parity_sigreg, "cjepa": parity_cjepa}
            name = json.loads(str(archive["config"]))["method"]
            if name not in known:
                raise SystemExit(f"{path}: an archive of {name}, of which there is no method here")
            return known[name](archive)
        return parity_ibot(archive) if "center_before" in archive.files else parity_mae(archive)


def main(argv: list[str]) -> int:
    """Print the table; 0 when every error is under the tolerance."""
    if len(argv) != 1 or not Path(argv[0]).is_file():
        print(f"usage: python tests/parity.py FILE.npz; got {argv}", file=sys.stderr)
        return 2
    errors = parity(argv[0])
    for name, error in errors.items():
        print(f"{error:9.2e}  {name}{'' if error < TOLERANCE else '   <-- over the tolerance'}")
    worst = max(errors, key=errors.get)
    print(f"largest: {errors[worst]:.2e} ({worst}); tolerance {TOLERANCE:g}; {len(errors)} quantities")
    return 0 if errors[worst] < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
