"""Nothing writes outside its output: every tensor that an op allocates lies between guards, which stay as they are."""

import pytest
import torch

from ijepa_fast.kernels.bias_gelu import bias_gelu
from ijepa_fast.kernels.layer_norm import layer_norm
from ijepa_fast.kernels.mask_sampler import Key, random_subset, sample_blocks
from ijepa_fast.kernels.masked_gather import masked_gather
from ijepa_fast.kernels.patchify import patchify
from ijepa_fast.kernels.predictor_tokens import predictor_readout, predictor_tokens
from ijepa_fast.kernels.target_loss import target_loss
from ijepa_fast.kernels.varlen_attention import varlen_attention, varlen_attention_qkv
from ijepa_fast.masks.packing import pack
from ijepa_fast.masks.samplers import make_sampler

GUARD, PATTERN = 4096, 0xA5  # bytes on either side, and what they hold


class Guards:
    """Stands in for torch's allocating functions and remembers the memory around what they gave."""

    def __init__(self, monkeypatch):
        self.buffers = []
        zeros = torch.zeros
        monkeypatch.setattr(torch, "empty", lambda *shape, **options: self.make(flat(shape), **options))
        monkeypatch.setattr(torch, "zeros", lambda *shape, **options: self.make(flat(shape), **options).zero_())
        monkeypatch.setattr(torch, "empty_like", lambda x, **options: self.make(x.shape, **like(x, options)))
        monkeypatch.setattr(
            torch.Tensor, "new_empty", lambda x, *shape, **options: self.make(flat(shape), **like(x, options))
        )
        self.zeros = zeros

    def make(self, shape, dtype=torch.float32, device="cpu", **_):
        """A tensor in the middle of a buffer."""
        size = dtype.itemsize * torch.Size(shape).numel()
        buffer = self.zeros(2 * GUARD + size, dtype=torch.uint8, device=device).fill_(PATTERN)
        self.buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(dtype).view(shape)

    def check(self):
        """Fail if anything around the tensors given so far was written to."""
        assert self.buffers
        for buffer, size in self.buffers:
            assert (buffer[:GUARD] == PATTERN).all(), f"written before a tensor of {size} bytes"
            assert (buffer[GUARD + size :] == PATTERN).all(), f"written behind a tensor of {size} bytes"


def flat(shape):
    return shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape


def like(x, options):
    return {"dtype": x.dtype, "device": x.device, **options}


def batch(device):
    return pack(make_sampler("multiblock", (5, 5), min_keep=2)(3, 0, 0)).to(device)


def run_patchify(device, random):
    patchify(torch.zeros(2, 15, 25, 3, dtype=torch.uint8, device=device), 5, (0.5,) * 3, (0.2,) * 3)


def run_masked_gather(device, random):
    index = torch.tensor([4, 0, 4, 12, 7], dtype=torch.int32, device=device)
    for unique, chosen in ((False, index), (True, index[1:])):
        x, positions = random(13, 37), random(6, 37)
        masked_gather(x, chosen, positions, unique=unique).sum().backward()


def run_varlen_attention(device, random):
    # Both backward passes: sequences that one tile holds, and a longer one.
    for lengths, head_dim in (([5, 0, 70], 24), ([140, 9], 40)):
        cu = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        qkv = random(sum(lengths), 3, 1, head_dim)
        varlen_attention_qkv(qkv, cu, max(lengths)).sum().backward()
        queries = torch.arange(len(cu), dtype=torch.int32, device=device) * 3
        q, k, v = random(3 * len(lengths), 1, head_dim), random(*qkv[:, 0].shape), random(*qkv[:, 0].shape)
        varlen_attention(q, k, v, queries, cu, 3, max(lengths)).sum().backward()


def run_layer_norm(device, random):
    for residual in (None, random(11, 37)):
        out = layer_norm(random(11, 37), random(37), random(37), residual=residual)
        (out if residual is None else out[0] + out[1]).sum().backward()


def run_bias_gelu(device, random):
    bias_gelu(random(19, 37), random(37)).sum().backward()


def run_predictor_tokens(device, random):
    packed = batch(device)
    tokens = predictor_tokens(
        random(len(packed.context_index), 37), random(37), random(packed.patches, 37).detach(), packed
    )
    predictor_readout(tokens, packed).sum().backward()


def run_target_loss(device, random):
    index = torch.tensor([4, 0, 4], dtype=torch.int32, device=device)
    (3 * target_loss(random(3, 37), random(5, 37).detach(), index)).backward()


def run_mask_sampler(device, random):
    context, _ = sample_blocks(Key(0, 0, 0), 3, (5, 7), 2, (2, 3), 2, (4, 6), 3, False, device=device)
    random_subset(Key(0, 0, 0), context[0].clone(), context[0].sum(1).int() // 2)


RUNS = {name.removeprefix("run_"): run for name, run in globals().items() if name.startswith("run_")}


@pytest.mark.parametrize("op", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_is_written_outside(triton_everywhere, monkeypatch, op, dtype):
    def random(*shape):
        return torch.randn(shape).to(triton_everywhere, dtype).requires_grad_()

    guards = Guards(monkeypatch)
    RUNS[op](triton_everywhere, random)
    guards.check()


def test_guards_notice_a_write_outside(monkeypatch):
    guards = Guards(monkeypatch)
    torch.as_strided(torch.empty(3, 5), (16,), (1,)).fill_(1)
    with pytest.raises(AssertionError, match="written behind a tensor of 60 bytes"):
        guards.check()
