"""Frozen features: average-pooled patch features of every image, cached once and shared by all probes."""

import torch


def pool(dense):
    """Average over patches: (b, N, D) -> (b, D) fp32; of a list of layers, side by side: (b, layers*D)."""
    if isinstance(dense, list | tuple):
        return torch.cat([pool(layer) for layer in dense], dim=1)
    if dense.dim() != 3:
        raise ValueError(f"encode: expected features of shape (images, patches, width), got {tuple(dense.shape)}")
    return dense.float().mean(1)


@torch.no_grad()
def pooled_features(encode, batches, device="cpu"):
    """Average-pooled features of every image (I-JEPA, appendix A.2).

    encode: images uint8 (b, H, W, 3) on `device` -> dense features (b, N, D), or a list of them, one a layer, which are
        pooled and concatenated.
    batches: iterable of (images, labels), labels any tensor with one row an image.
    Returns (features (n, D) fp32, labels (n, ...)), both on the CPU.
    """
    features, labels = [], []
    for images, target in batches:
        features.append(pool(encode(images.to(device, non_blocking=True))).cpu())
        labels.append(torch.as_tensor(target).cpu())
        if len(features[-1]) != len(labels[-1]):
            raise ValueError(f"batches: {len(features[-1])} images with {len(labels[-1])} labels")
    if not features:
        raise ValueError("batches: expected at least one batch, got none; is the folder empty?")
    return torch.cat(features), torch.cat(labels)


class Standardiser:
    """Zero mean and unit variance by the statistics of the training features (batch normalisation without affine,
    whose batch is the whole training set). per_feature=False divides by one number for all features instead.
    """

    def __init__(self, features, per_feature=True, eps=1e-5):
        self.mean = features.mean(0)
        variance = features.var(0, correction=0)
        self.scale = (variance if per_feature else variance.mean()).add(eps).rsqrt()

    def __call__(self, features):
        """(n, D) -> (n, D)."""
        return (features - self.mean) * self.scale
