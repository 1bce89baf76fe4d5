"""Images a second of the training loader, beside what there is.

    python bench/data.py --source PATH [--device cpu|gpu] [--json FILE]

Contenders, all making 224-pixel random resized crops with the same threads, interleaved round by round:
  loader        ijepa_fast's TrainLoader: files read, decoded, cropped, resized, in batches
  in-memory     the same after its first epoch, which kept the files' bytes: as the ceilings, without reading
  decode        DALI decoding whole images whose bytes are in memory already: the ceiling of decode alone
  decode-crop   the same, decoding only the window: the ceiling without any resize
  dali          DALI's own file reader, fused decode and crop, and its resize: the usual DALI pipeline
  pillow        a plain Pillow dataset (decode, crop, resize) behind torch's DataLoader with as many workers
On a GPU also the loader at several shares of the hardware JPEG decoder. Then the share of a training step spent waiting
for data, with a consumer that is busy as long as the fastest thinkable step (790 TFLOP/s) of B/16 and H/14 would be.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bench.report import data_table
from bench.run import about
from ijepa_fast.data.crops import TRIES, counter_uniform, random_resized_crop
from ijepa_fast.data.dali import TrainLoader
from ijepa_fast.data.decode import import_dali
from ijepa_fast.data.headers import screen
from ijepa_fast.data.scan import EXTENSIONS
from ijepa_fast.data.sources import Source, open_source

SCALE, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)
# Images/s and batch of one GPU at 790 TFLOP/s with all context tokens: no real step is faster.
STEPS = {"B/16": (7300, 256), "H/14": (941, 128)}
HARDWARE_SHARES = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
IN_MEMORY = 1000  # images of the two decode ceilings


def loader(source: Source, args, device: str, share: float = 0.65, cache_bytes: int = 0) -> Iterator[int]:
    """Images of each batch of ijepa_fast's loader. With `cache_bytes`, of those after the first epoch."""
    batches = TrainLoader(
        source,
        batch_size=args.batch_size,
        crop=args.crop,
        scale=SCALE,
        ratio=RATIO,
        device=device,
        threads=args.threads,
        hw_decoder_load=share,
        cache_bytes=cache_bytes,
    )
    try:
        for _ in range(batches.steps_per_epoch + 1 if cache_bytes else 0):
            next(batches)
        for batch in batches:
            yield len(batch.images)
    finally:
        batches.close()


@functools.cache
def in_memory(source: Source) -> tuple[list[np.ndarray], np.ndarray]:
    """The first samples' bytes, and their heights and widths (n, 2)."""
    data = [source.read(i) for i in range(min(len(source), IN_MEMORY))]
    return [np.frombuffer(one, np.uint8) for one in data], np.array([screen(one) for one in data])


def decode(source: Source, args, device: str, crop: bool) -> Iterator[int]:
    """DALI's decoder alone, on bytes in memory, of whole images or of windows."""
    encoded, sizes = in_memory(source)
    count = len(encoded)
    if crop:
        windows = random_resized_crop(sizes, counter_uniform(0, np.arange(count), 2 * TRIES + 2), SCALE, RATIO)
    else:
        windows = np.concatenate([0 * sizes, sizes[:, ::-1]], axis=1).astype(np.int32)

    def feed():
        first = 0
        while True:
            rows = np.arange(first, first + args.batch_size) % count
            first += args.batch_size
            yield [encoded[i] for i in rows], windows[rows, :2].copy(), windows[rows, 2:].copy()

    dali = import_dali()
    pipe = dali.Pipeline(args.batch_size, args.threads, 0 if device.startswith("cuda") else None)
    with pipe:
        data, start, shape = dali.fn.external_source(feed(), num_outputs=3, no_copy=True)
        place = "mixed" if device.startswith("cuda") else "cpu"
        pipe.set_outputs(dali.fn.decoders.image_slice(data, start, shape, device=place))
    pipe.build()
    while True:
        pipe.run()
        yield args.batch_size


def dali_pipeline(source: Source, args, device: str) -> Iterator[int]:
    """DALI's file reader, decode fused with its random crop, its resize."""
    dali = import_dali()
    fn = dali.fn
    on_gpu = device.startswith("cuda")
    pipe = dali.Pipeline(args.batch_size, args.threads, 0 if on_gpu else None, seed=0)
    with pipe:
        options = {"random_shuffle": True, "initial_fill": len(source)}
        if source.index.shards:
            kinds = ";".join(name[1:] for extension in EXTENSIONS for name in (extension, extension.upper()))
            data = fn.readers.webdataset(
                paths=source.index.shards, ext=[kinds], missing_component_behavior="skip", **options
            )
        else:
            data, _ = fn.readers.file(files=[source.name(i) for i in range(len(source))], **options)
        images = fn.decoders.image_random_crop(
            data, device="mixed" if on_gpu else "cpu", random_area=SCALE, random_aspect_ratio=RATIO
        )
        pipe.set_outputs(fn.resize(images, size=[args.crop, args.crop], antialias=True))
    pipe.build()
    while True:
        (images,) = pipe.run()
        if not on_gpu:
            torch.from_numpy(np.array(images.as_tensor()))
        yield args.batch_size


class PillowDataset(Dataset):
    """Decode the whole image, cut the window, resize: what a plain loader does."""

    def __init__(self, source: Source, crop: int):
        self.source, self.crop = source, crop

    def __len__(self) -> int:
        return 1 << 40  # endless: the worker draws the sample

    def __getitem__(self, position: int) -> torch.Tensor:
        data = self.source.read(position * 7919 % len(self.source))
        image = Image.open(io.BytesIO(data)).convert("RGB")
        size = np.array([[image.height, image.width]])
        uniform = counter_uniform(0, np.array([position]), 2 * TRIES + 2)
        ((x, y, w, h),) = random_resized_crop(size, uniform, SCALE, RATIO).tolist()
        image = image.crop((x, y, x + w, y + h)).resize((self.crop, self.crop), Image.BILINEAR)
        return torch.from_numpy(np.array(image))


def pillow(source: Source, args, device: str) -> Iterator[int]:
    """Pillow behind a DataLoader."""
    batches = DataLoader(
        PillowDataset(source, args.crop),
        args.batch_size,
        sampler=range(1 << 40),
        num_workers=args.threads,
        pin_memory=device.startswith("cuda"),
    )
    for batch in batches:
        yield len(batch.to(device))


def cpu_seconds() -> float:
    """CPU time of this process, its threads and its DataLoader's workers."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        user, system = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def measure(contenders: dict[str, Callable[[], Iterator[int]]], seconds: float, rounds: int) -> dict[str, list[tuple]]:
    """Of every contender in each round: images/s, and CPU milliseconds an image of all its threads and processes.

    One runs at a time, and is closed before the next begins. Both are taken between two batches, with as many
    prefetched at the end as at the begin. The CPU time tells more where other programs are running.
    """
    results: dict[str, list[tuple]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, make in contenders.items():
            batches = make()
            for _ in range(8):  # until the threads run and the queues are full
                next(batches)
            images, begin, cpu_begin = 0, time.perf_counter(), cpu_seconds()
            while time.perf_counter() - begin < seconds:
                images += next(batches)
            rate = images / (time.perf_counter() - begin)
            cpu = cpu_seconds() - cpu_begin
            batches.close()
            results[name].append((rate, 1e3 * cpu / images))
    return results


def occupy(seconds: float, device: str) -> None:
    """Be busy as a training step is: with matrix products on a GPU; on the CPU, where no step is that fast, asleep."""
    if not device.startswith("cuda"):
        return time.sleep(seconds)
    a = torch.zeros(8192, 8192, dtype=torch.bfloat16, device=device)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        a @ a
        torch.cuda.synchronize(device)


def wait_share(source: Source, args, device: str, rate: float, batch: int) -> float:
    """The share of a step spent inside `next`, for a step that handles `rate` images/s in batches of `batch`."""
    batch = min(batch, len(source))
    batches = TrainLoader(source, batch_size=batch, crop=args.crop, device=device, threads=args.threads, cache_bytes=0)
    next(batches)
    before, begin = batches.wait_seconds, time.perf_counter()
    while time.perf_counter() - begin < 2 * args.seconds:
        next(batches)
        occupy(batch / rate, device)
    share = (batches.wait_seconds - before) / (time.perf_counter() - begin)
    batches.close()
    return share


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder of images, tar shards, or text list of paths")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=3, help="of each contender in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    device = "cuda:0" if args.device == "gpu" else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        parser.error("--device gpu: torch sees no CUDA device here; use --device cpu")
    source = open_source(args.source)

    contenders = {
        "loader": lambda: loader(source, args, device),
        "in-memory": lambda: loader(source, args, device, cache_bytes=1 << 30),
        "decode": lambda: decode(source, args, device, crop=False),
        "decode-crop": lambda: decode(source, args, device, crop=True),
        "dali": lambda: dali_pipeline(source, args, device),
        "pillow": lambda: pillow(source, args, device),
    }
    if device != "cpu":
        contenders |= {f"loader, hw {s:g}": lambda s=s: loader(source, args, device, s) for s in HARDWARE_SHARES}
    in_memory(source)
    measured = measure(contenders, args.seconds, args.rounds)

    facts = about(torch.device(device), "uint8")
    result = facts | {
        "versions": f"{facts['versions']}, dali {import_dali().__version__}",
        "images": len(source),
        "threads": args.threads,
        "batch_size": args.batch_size,
        "crop": args.crop,
        "contenders": {},
        "wait_share": {},
    }
    for name, rounds in measured.items():
        pairs = list(zip(measured["loader"], rounds))
        rate, cpu = (statistics.median(column) for column in zip(*rounds))
        by_time = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)
        by_cpu_time = statistics.median(theirs[1] / ours[1] for ours, theirs in pairs)
        result["contenders"][name] = {
            "images_per_second": rate,
            "per_core": rate / args.threads,
            "cpu_ms_per_image": cpu,
            "loader_over_this": by_time,
            "loader_over_this_by_cpu_time": by_cpu_time,
        }
    for model, (rate, batch) in STEPS.items():
        share = wait_share(source, args, device, rate, batch)
        result["wait_share"][model] = {"step_images_per_second": rate, "batch": batch, "share": share}
    print("\n".join(data_table(result)))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
