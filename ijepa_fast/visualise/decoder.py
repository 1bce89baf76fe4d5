"""The decoder: a small diffusion model of images that is told a pooled feature (RCDM, Bordes et al. 2022).

It is diffusers' U-Net on images folded into channels. A linear layer of the feature is added to the embedding of the
time, and reaches every residual block as scale and shift of its second norm. It predicts v (Salimans and Ho 2022),
which is steady where all is noise; errors are given of the noise, as the paper's objective is.

Shapes: b images of h x w pixels in -1..1, D width of the feature.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.data import Size

TIMES = 1000  # of noising
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": TIMES,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}
CHANNELS = (64, 128)
HEAD_DIM = 32


def diffusers() -> ModuleType:
    """The package. Raises ImportError, in a sentence, where it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError:
        raise ImportError(
            "visualise needs the package diffusers, which is not installed; pip install ijepa_fast[visualise]"
        ) from None


class Decoder(nn.Module):
    """From noisy images, times and features to v.

    Attributes:
        precision: bf16 or fp32, what is computed in; weights are fp32.

    Args:
        width: D. size: h and w. fold: side of the squares of pixels that become channels; it divides h and w into an
        even number of them. channels: of the U-Net at full and at half resolution; None: CHANNELS.
    """

    def __init__(self, width: int, size: Size, fold: int, channels: tuple[int, int] | None = None):
        super().__init__()
        channels = channels or CHANNELS
        self.fold, self.precision = fold, "fp32"
        values = 3 * fold**2
        self.told = nn.Linear(width, 4 * channels[0])
        self.unet = diffusers().UNet2DModel(
            sample_size=(size[0] // fold, size[1] // fold),
            in_channels=values,
            out_channels=values,
            layers_per_block=1,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=min(HEAD_DIM, channels[1]),
            norm_num_groups=min(32, channels[0]),
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        )
        plain = importlib.import_module("diffusers.models.attention_processor").AttnProcessor
        for module in self.unet.modules():  # PyTorch's fused attention is several times slower in bf16 on a CPU
            if hasattr(module, "set_processor"):
                module.set_processor(plain())
        schedule = diffusers().DDPMScheduler(**SCHEDULE)
        self.alphas: torch.Tensor
        self.register_buffer("alphas", schedule.alphas_cumprod, persistent=False)

    def forward(
        self, noisy: torch.Tensor, times: torch.Tensor, told: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`noisy` (b, 3, h, w), `times` (b,) int64 or a scalar, `told` (b, D) -> v (b, 3, h, w).

        keep: bool (b,), of which images the feature is used; None: of all.
        """
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            embedded = self.told(told)
            if keep is not None:
                embedded = embedded * keep[:, None]
            found = self.unet(F.pixel_unshuffle(noisy, self.fold), times, class_labels=embedded).sample
        return F.pixel_shuffle(found.float(), self.fold)

    def errors(
        self,
        images: torch.Tensor,
        noise: torch.Tensor,
        times: torch.Tensor,
        told: torch.Tensor,
        keep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared errors of v and of the noise, both (b, 3, h, w), of `images` with `noise` at `times` (b,) int64."""
        kept = self.alphas[times].view(-1, 1, 1, 1)
        root, rest = kept.sqrt(), (1 - kept).sqrt()
        found = self(root * images + rest * noise, times, told, keep)
        error = (found - (root * noise - rest * images)).square()
        return error, kept * error

    @torch.no_grad()
    def sample(self, told: torch.Tensor, noise: torch.Tensor, steps: int = 50, guidance: float = 1.0) -> torch.Tensor:
        """Images (b, 3, h, w) in 0..1 of features (b, D), from `noise` (b, 3, h, w) alone: DDIM without fresh noise.

        guidance: by how much what the feature changes is exaggerated; 1: not at all.
        """
        scheduler = diffusers().DDIMScheduler(**SCHEDULE, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        images, nothing = noise, torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
        for time in scheduler.timesteps.to(noise.device):
            found = self(images, time, told)
            if guidance != 1:
                without = self(images, time, told, nothing)
                found = without + guidance * (found - without)
            images = scheduler.step(found, time, images).prev_sample
        return (images.clamp(-1, 1) + 1) / 2
