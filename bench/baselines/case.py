"""A case of bench/throughput.py: one model of a method at one size, with its random images and masks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ijepa_fast.config import ARCHITECTURES, Data, Mask, Model
from ijepa_fast.masks.crops import LARGE, CropSampler, smaller
from ijepa_fast.masks.draw import Draw
from ijepa_fast.masks.samplers import Masks, make_sampler
from ijepa_fast.methods import ibot, mae
from ijepa_fast.methods.method import Setup

DECODER_WIDTH, DECODER_DEPTH = 512, 8  # MAE's
PREDICTOR_DEPTHS = {"vit_tiny": 6, "vit_small": 6, "vit_base": 6, "vit_large": 12, "vit_huge": 12, "vit_giant": 16}


@dataclass(frozen=True)
class Case:
    """One model at one size on one device."""

    method: str = "ijepa"
    arch: str = "vit_small"
    widths: tuple | None = None  # (dim, depth, heads, MLP ratio, predictor's dim) of a model that has no name
    crop: int = 224
    patch: int = 16
    batch: int = 16
    device: str = "cpu"
    precision: str = "fp32"
    predictor_depth: int | None = None  # of MAE: the decoder's; None: as published
    batches: int = 4  # distinct ones, taken in turn
    seed: int = 0
    compile: tuple[str, ...] = ()  # implementations that torch.compile may change
    head: dict = field(default_factory=dict)  # the method's options, where not as published (not I-JEPA's, MAE's)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return (self.crop // self.patch,) * 2

    @property
    def patches(self) -> int:
        """Patches per image."""
        return self.grid[0] * self.grid[1]

    @property
    def low_precision(self) -> bool:
        """Whether anything but fp32 is asked for."""
        return self.precision != "fp32"

    @property
    def sizes(self) -> dict:
        """Keyword arguments of an encoder."""
        dim, depth, heads, ratio = self.widths[:4] if self.widths else ARCHITECTURES[self.arch]
        sizes = {"image_size": self.crop, "patch": self.patch, "dim": dim, "depth": depth, "heads": heads}
        return sizes | {"mlp_ratio": ratio}

    @property
    def predictor_sizes(self) -> dict:
        """Keyword arguments of a predictor, of MAE's decoder."""
        published = {"mae": (DECODER_WIDTH, DECODER_DEPTH)}.get(self.method, (384, PREDICTOR_DEPTHS.get(self.arch)))
        dim = self.widths[4] if self.widths else published[0]
        sizes = {"grid": self.grid, "encoder_dim": self.sizes["dim"], "dim": dim, "heads": self.sizes["heads"]}
        return sizes | {"depth": self.predictor_depth or published[1], "mlp_ratio": self.sizes["mlp_ratio"]}

    @property
    def mask(self) -> Mask:
        """I-JEPA's masks as published, but on grids too small for that."""
        return Mask(strategy="multiblock-reference", min_keep=min(10, self.patches // 16))

    def setup(self, options: object) -> Setup:
        """What a method of this size is made from; options: the method's."""
        sizes, predictor = self.sizes, self.predictor_sizes
        names = ("dim", "depth", "heads", "mlp_ratio", "patch")
        narrow = {"predictor_dim": predictor["dim"], "predictor_depth": predictor["depth"]}
        model = Model(**{name: sizes[name] for name in names}, **narrow)
        mask = self.mask if self.method == "ijepa" else Mask()
        return Setup(model, Data(source="synthetic", crop=self.crop), mask, options)

    def images(self, i: int) -> torch.Tensor | list[torch.Tensor]:
        """Random images of batch `i`, uint8 (B, H, W, 3); of several views a list of them."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + i)

        def draw(side: int) -> torch.Tensor:
            return torch.randint(256, (self.batch, side, side, 3), dtype=torch.uint8, generator=generator)

        if self.method in ("ijepa", "mae"):
            return draw(self.crop)
        if self.method != "ibot":
            from bench.baselines import others  # which is made of cases

            sides = [view.crop for view in others.sketch(self).views()]
            return [draw(side) for side in sides] if sides else draw(self.crop)
        small = smaller(self.grid)[0] * self.patch
        return [draw(side) for side in [self.crop] * LARGE + [small] * ibot.Options.small_crops]

    def masks(self, i: int) -> Masks | Draw:
        """The masks of batch `i`; of methods but I-JEPA and MAE a whole draw."""
        if self.method not in ("ijepa", "mae", "ibot"):
            from bench.baselines import others

            return others.sketch(self).draw(self.batch, self.seed, i)
        if self.method == "ibot":
            published = ibot.Options
            temperatures = published.first_temperature, published.temperature
            sampler = CropSampler(self.grid, published.small_crops, self.sizes["depth"], temperatures)
            return sampler(self.batch, self.seed, i)
        if self.method == "mae":
            return make_sampler("random", self.grid, target_scale=(mae.MASKED_SHARE,) * 2)(self.batch, self.seed, i)
        return make_sampler(self.mask.strategy, self.grid, min_keep=self.mask.min_keep)(self.batch, self.seed, i)
