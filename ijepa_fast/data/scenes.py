"""The embedded data set: small rendered scenes, written as JPEG files with labels.

One to five lit solids (spheres, cubes, cylinders, cones) of random size, colour, texture and place stand on a dull
ground, cast shadows and hide parts of each other, as in Clevr (Johnson et al. 2017). There are labels of two sorts, as
in the paper's probes (I-JEPA, section 6). One is semantic: the `kind` of the object with the largest visible area. Two
are local: the `count` of objects, and the `distance` of the nearest, a class of its distance in `metres`. Colours,
textures, light and camera are drawn independently of the labels. Where they are asked for there are maps too: the class
and the depth of every pixel.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ijepa_fast.cores import cores
from ijepa_fast.files import publish

KINDS = ("cone", "cube", "cylinder", "sphere")
MAX_OBJECTS = 5
NEAREST, FARTHEST = (3.5, 7.0), 9.0  # metres from the camera: range of the nearest object, bound of the others
DISTANCES = 5  # classes of equal width over NEAREST
VERSION = 2  # of the images: raise it when they change, so that cached folders are written anew
MAP_CLASSES = ("sky", "ground", *KINDS)  # of the maps, numbered from 1
MAP_DEPTH = 20.0  # metres: what is farther, and the sky, has no depth in the maps

# Half extents by kind. They give all kinds about the same visible area, so that the size does not tell the kind.
_EXTENT = {"cone": 1.2, "cube": 0.85, "cylinder": 0.9, "sphere": 1.05}
_NAME = re.compile(rf"scenes-v{VERSION}-(\d+)x(\d+)-seed(\d+)")  # of a folder
_SUPERSAMPLE = 2
_LOOK = 48  # side in pixels of the small image by which a scene is accepted or rejected
_EPSILON = 1e-3
_LABELS = ("file", "kind", "count", "distance", "metres")


@dataclass
class Solid:
    """One object.

    centre: (3,), metres, z up. scale: (3,), half extents in metres. yaw: rotation about the vertical, radians. colours:
    (2, 3) in [0, 1], which the texture `pattern` mixes, `frequency` times per unit. gloss: strength of the highlight.
    """

    kind: str
    centre: np.ndarray
    scale: np.ndarray
    yaw: float
    colours: np.ndarray
    pattern: int
    frequency: float
    gloss: float

    def to_local(self, vectors: np.ndarray) -> np.ndarray:
        """Turn directions of the world, (3, R), into the frame where the solid spans [-1, 1]^3."""
        c, s = np.float32(np.cos(self.yaw)), np.float32(np.sin(self.yaw))
        x, y, z = vectors
        return np.stack([c * x + s * y, c * y - s * x, z]) / self.scale[:, None]

    def normal(self, points: np.ndarray) -> np.ndarray:
        """Outward unit normals in the world, (3, R), at surface points in the solid's frame, (3, R)."""
        x, y, z = points
        if self.kind == "sphere":
            local = points
        elif self.kind == "cube":
            side = np.abs(points).argmax(0)
            local = np.where(np.arange(3)[:, None] == side, np.sign(points), 0)
        elif self.kind == "cylinder":
            flat = np.abs(z) > np.hypot(x, y)
            local = np.where(flat, np.stack([0 * x, 0 * y, np.sign(z)]), np.stack([x, y, 0 * z]))
        else:
            flat = z + 1 < (1 - z) / 2 - np.hypot(x, y)
            local = np.where(flat, np.stack([0 * x, 0 * y, z]), np.stack([x, y, (1 - z) / 4]))
        c, s = np.float32(np.cos(self.yaw)), np.float32(np.sin(self.yaw))
        x, y, z = local / self.scale[:, None]
        normal = np.stack([c * x - s * y, s * x + c * y, z])
        return normal / np.sqrt(np.maximum(_dot(normal, normal), 1e-12))


@dataclass
class Scene:
    """What is to be drawn.

    camera: (3,), its position. axes: (3, 3), its right, up and forward. focal: its focal length in halves of the
    image's width. light: (3,), unit vector towards the light. ambient: share of the light that reaches shadows. tint:
    (3,), the light's colour.
    """

    solids: list[Solid]
    camera: np.ndarray
    axes: np.ndarray
    focal: float
    light: np.ndarray
    ambient: float
    tint: np.ndarray
    ground: tuple[np.ndarray, int, float, float]  # colours (2, 3), pattern, frequency, yaw
    sky: np.ndarray  # (2, 3): horizon, zenith


def _interval(kind: str, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The t at which the rays o + t*d, (3, R), enter and leave the unit solid of `kind`.

    A ray that misses it gets NaN, or enter >= leave.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if kind == "sphere":
            return _quadric(_dot(d, d), _dot(o, d), _dot(o, o) - 1)
        axes = slice(0, 3) if kind == "cube" else slice(2, 3)
        a, b = (-1 - o[axes]) / d[axes], (1 - o[axes]) / d[axes]
        enter, leave = np.minimum(a, b).max(0), np.maximum(a, b).min(0)
        if kind == "cube":
            return enter, leave
        (ox, oy, oz), (dx, dy, dz) = o, d
        if kind == "cylinder":
            first, last = _quadric(dx * dx + dy * dy, ox * dx + oy * dy, ox * ox + oy * oy - 1)
        else:
            # The double cone x^2 + y^2 = ((1 - z) / 2)^2: a steep ray (a < 0) is inside from the lower nappe downwards.
            r, dr = (1 - oz) / 2, -dz / 2
            a = dx * dx + dy * dy - dr * dr
            first, last = _quadric(a, ox * dx + oy * dy - r * dr, ox * ox + oy * oy - r * r)
            low, high = np.minimum(first, last), np.maximum(first, last)
            steep, down = a < 0, dz < 0
            infinite = np.float32(np.inf)
            first = np.where(steep, np.where(down, high, -infinite), low)
            last = np.where(steep, np.where(down, infinite, low), high)
        return np.maximum(enter, first), np.minimum(leave, last)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The dot product over the first axis, of length 3; several times faster than a sum over so short an axis."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _quadric(a: np.ndarray, half_b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Roots of a*t^2 + 2*half_b*t + c, NaN where there are none."""
    root = np.sqrt(half_b * half_b - a * c)
    return (-half_b - root) / a, (-half_b + root) / a


def _hits(solid: Solid, origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which unit rays hit `solid` in front of their origin, as indices, and at what distance.

    origin, direction: (3, R), or (3, 1) where all rays share it.
    """
    to_centre = solid.centre[:, None] - origin
    along = _dot(to_centre, direction)
    near = _dot(to_centre, to_centre) - along * along <= _dot(solid.scale, solid.scale)
    rays = np.flatnonzero(near & (along > 0))
    from_centre = -to_centre if to_centre.shape[1] == 1 else -to_centre[:, rays]
    towards = direction if direction.shape[1] == 1 else direction[:, rays]
    enter, leave = _interval(solid.kind, solid.to_local(from_centre), solid.to_local(towards))
    hit = (enter < leave) & (enter > _EPSILON)
    return rays[hit], enter[hit]


def _cast(scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixels' rays, (3, size*size); per ray the distance of what it hits first (inf: sky), and which solid that is
    (-1: ground or sky).
    """
    grid = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5) * 2
    right, up, forward = scene.axes
    rays = forward[:, None, None] * scene.focal + right[:, None, None] * grid - up[:, None, None] * grid[:, None]
    rays = rays.reshape(3, -1)
    rays = (rays / np.sqrt(_dot(rays, rays))).astype(np.float32)
    with np.errstate(divide="ignore"):
        depth = np.where(rays[2] < -1e-4, -scene.camera[2] / rays[2], np.float32(np.inf))
    which = np.full(len(depth), -1)
    for number, solid in enumerate(scene.solids):
        index, distance = _hits(solid, scene.camera[:, None], rays)
        closer = distance < depth[index]
        depth[index[closer]] = distance[closer]
        which[index[closer]] = number
    return rays, depth, which


def _pattern(kind: int, frequency: float, points: np.ndarray) -> np.ndarray:
    """A texture in [0, 1] at points (3, R): plain, stripes, checks, waves."""
    x, y, z = points * np.float32(frequency)
    if kind == 0:
        return np.zeros_like(x)
    if kind == 1:
        return (np.sin(np.pi * (x + 0.5 * z)) > 0).astype(np.float32)
    if kind == 2:
        return ((np.floor(x) + np.floor(y) + np.floor(z + 1e-3)) % 2).astype(np.float32)
    return 0.5 + 0.25 * (np.sin(2.3 * x + 1.1 * y) + np.sin(1.7 * y - 2.9 * z + 0.7 * x))


def render(scene: Scene, size: int) -> np.ndarray:
    """The image of a scene: uint8 (size, size, 3)."""
    fine = size * _SUPERSAMPLE
    rays, depth, which = _cast(scene, fine)
    colour = np.empty_like(rays)
    height = np.clip(rays[2] * 2, 0, 1)
    sky = scene.sky[0][:, None] * (1 - height) + scene.sky[1][:, None] * height
    solid_ground = np.isfinite(depth)
    colour[:, ~solid_ground] = sky[:, ~solid_ground]

    seen = np.flatnonzero(solid_ground)
    points = scene.camera[:, None] + rays[:, seen] * depth[seen]
    owner = which[seen]
    albedo, normal, gloss = np.empty_like(points), np.zeros_like(points), np.zeros(len(seen), np.float32)
    for number, solid in enumerate(scene.solids):
        here = np.flatnonzero(owner == number)
        local = solid.to_local(points[:, here] - solid.centre[:, None])
        mix = _pattern(solid.pattern, solid.frequency, local)
        albedo[:, here] = solid.colours[0][:, None] * (1 - mix) + solid.colours[1][:, None] * mix
        normal[:, here] = solid.normal(local)
        gloss[here] = solid.gloss
    here = np.flatnonzero(owner < 0)
    colours, kind, frequency, yaw = scene.ground
    c, s = np.float32(np.cos(yaw)), np.float32(np.sin(yaw))
    x, y, z = points[:, here]
    mix = _pattern(kind, frequency, np.stack([c * x + s * y, c * y - s * x, 0 * z]))
    albedo[:, here] = colours[0][:, None] * (1 - mix) + colours[1][:, None] * mix
    normal[2, here] = 1

    light = scene.light[:, None]
    facing = np.maximum(_dot(normal, light), 0)
    above = points + normal * np.float32(5e-3)
    lit = np.ones(len(seen), np.float32)
    for solid in scene.solids:
        index, _ = _hits(solid, above, light)
        lit[index] = 0
    half = light - rays[:, seen]
    half /= np.sqrt(_dot(half, half))
    shine = gloss * lit * np.maximum(_dot(normal, half), 0) ** 32
    shaded = albedo * (scene.ambient + (1 - scene.ambient) * facing * lit) * scene.tint[:, None] + shine
    haze = np.where(owner < 0, 1 - np.exp(-np.maximum(depth[seen] - 8, 0) / 20), 0)
    colour[:, seen] = shaded * (1 - haze) + sky[:, seen] * haze

    mean = colour.reshape(3, size, _SUPERSAMPLE, size, _SUPERSAMPLE).mean((2, 4))
    return (np.clip(mean, 0, 1) ** (1 / 1.8) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


def _draw(rng: np.random.Generator, kind: str, count: int, nearest: float) -> tuple[Scene | None, int]:
    """A random scene, None where its objects do not fit; and which solid, of `kind`, is meant to be the largest."""
    f32 = np.float32
    camera = np.array([0, 0, rng.uniform(2.2, 3.4)], f32)
    pitch = -np.arctan2(camera[2] - 0.4, rng.uniform(5.0, 6.0))
    forward = np.array([0, np.cos(pitch), np.sin(pitch)], f32)
    right = np.array([1, 0, 0], f32)
    axes = np.stack([right, np.cross(right, forward), forward]).astype(f32)
    focal = rng.uniform(1.7, 2.0)

    solids: list[Solid] = []
    big = int(rng.integers(count))
    for number in range(count):
        kind_here = kind if number == big else KINDS[rng.integers(len(KINDS))]
        size = _EXTENT[kind_here] * rng.uniform(0.45, 0.6) * (rng.uniform(1.3, 1.7) if number == big else 1)
        scale = np.full(3, size, f32)
        if kind_here != "sphere":
            scale[2] *= rng.uniform(0.8, 1.3)
        for _ in range(40):
            distance = nearest if number == 0 else rng.uniform(nearest, FARTHEST)
            ground = np.sqrt(max(distance**2 - (camera[2] - scale[2]) ** 2, 1.0))
            y = ground * np.cos(angle := rng.uniform(-1, 1) * np.arctan(0.85 / focal))
            centre = np.array([ground * np.sin(angle), y, scale[2]], f32)
            gap = size + 0.1
            if all(np.hypot(*(centre - other.centre)[:2]) > gap + other.scale[0] for other in solids):
                break
        else:
            return None, big
        colour = rng.uniform(0.03, 0.95, 3).astype(f32)
        solids.append(
            Solid(
                kind=kind_here,
                centre=centre,
                scale=scale,
                yaw=rng.uniform(0, np.pi),
                colours=np.stack([colour, colour * f32(rng.uniform(0.5, 0.9))]),
                pattern=int(rng.integers(4)),
                frequency=rng.uniform(1.5, 4),
                gloss=rng.uniform(0, 0.6) if rng.random() < 0.5 else 0,
            )
        )
    azimuth, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.3)
    light = [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)]
    floor, sky = rng.uniform(0.3, 0.7) + rng.uniform(-0.1, 0.1, 3), rng.uniform(0.5, 1, 3)
    scene = Scene(
        solids=solids,
        camera=camera,
        axes=axes,
        focal=focal,
        light=np.array(light, f32),
        ambient=rng.uniform(0.25, 0.45),
        tint=rng.uniform(0.9, 1.1, 3).astype(f32),
        ground=(
            np.stack([floor, floor * rng.uniform(0.8, 0.95)]).astype(f32),
            int(rng.integers(4)),
            rng.uniform(0.4, 1.5),
            rng.uniform(0, np.pi),
        ),
        sky=np.stack([sky, 0.9 * sky]).astype(f32),
    )
    return scene, big


def draw_scene(seed: int, index: int) -> tuple[Scene, dict[str, object]]:
    """Scene `index` of `seed`, and its labels: kind, count, distance (a class) and metres.

    The labels are drawn first, uniformly. Then scenes are drawn until one shows them: every object covers at least
    1/120 of the image, and the one that is meant to be the largest has at least 1.2 times the area of any other.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    kind = KINDS[rng.integers(len(KINDS))]
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    metres = rng.uniform(*NEAREST)
    while True:
        scene, big = _draw(rng, kind, count, metres)
        if scene is None:
            continue
        _, _, which = _cast(scene, _LOOK)
        areas = np.bincount(which + 1, minlength=count + 1)[1:]
        if areas.min() >= _LOOK * _LOOK / 120 and areas[big] >= 1.2 * np.delete(areas, big).max(initial=0):
            break
    distance = int(DISTANCES * (metres - NEAREST[0]) / (NEAREST[1] - NEAREST[0]))
    return scene, {"kind": kind, "count": count, "distance": distance, "metres": round(metres, 3)}


def write_scenes(folder: str | Path, count: int, size: int = 96, seed: int = 0, processes: int | None = None) -> Path:
    """Write `count` scenes of `size` x `size` pixels as JPEG files, and labels.csv. Return the folder.

    The columns of labels.csv are file, kind, count, distance and metres. Scene i depends on seed, i and size only.
    processes: how many render; None: one per core. Raises ValueError for no scenes or a size below 16, RuntimeError
    where a process fails.
    """
    if count < 1 or size < 16:
        raise ValueError(f"scenes: expected count >= 1 and size >= 16, got count={count}, size={size}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = _render(folder, count, size, seed, processes)
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, _LABELS)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def _render(folder: Path, count: int, size: int, seed: int, processes: int | None, maps: bool = False) -> list[dict]:
    """Write images, or their maps, in several processes; what each says of its scenes."""
    processes = max(1, min(processes or cores(), count))
    # Plain child processes: to fork is unsafe beside the caller's threads, and multiprocessing's spawn would import the
    # caller's main module.
    bounds = np.linspace(0, count, processes + 1).astype(int)
    command = [sys.executable, "-m", "ijepa_fast.data.scenes", str(folder), "--size", str(size), "--seed", str(seed)]
    command += ["--maps"] if maps else []
    checkout = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([checkout, *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    children = [
        subprocess.Popen([*command, "--start", str(a), "--stop", str(b)], stdout=subprocess.PIPE, env=environment)
        for a, b in itertools.pairwise(bounds)
    ]
    try:
        what = "maps of scenes" if maps else "rendering scenes"
        with (
            tqdm(total=count, desc=what, unit="image", mininterval=1, disable=None) as bar,
            ThreadPoolExecutor(processes) as readers,  # one per child: a full pipe would stop its writer
        ):
            return [row for part in readers.map(lambda child: _rows(child, bar), children) for row in part]
    finally:
        for child in children:
            child.kill()
            child.wait()


def _rows(child: subprocess.Popen, bar: tqdm) -> list[dict]:
    rows = []
    for line in child.stdout or ():
        rows.append(json.loads(line))
        bar.update()
    if child.wait() != 0:
        raise RuntimeError(f"scenes: a rendering process ended with exit code {child.returncode}; its message is above")
    return rows


def ensure_scenes(folder: str | Path, count: int, size: int = 96, seed: int = 0, processes: int | None = None) -> Path:
    """A folder under `folder` that holds these scenes; they are rendered if they are not there yet.

    Of several processes, one renders and the others wait. Arguments and errors are those of `write_scenes`.
    """
    final = Path(folder) / f"scenes-v{VERSION}-{count}x{size}-seed{seed}"
    if final.is_dir():
        return final
    with publish(final, lock=True) as draft:
        if not final.is_dir():
            write_scenes(draft, count, size, seed, processes)
    return final


def draw_maps(scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The class of every pixel, uint8 (size, size), 1 + its place in MAP_CLASSES; and its depth, float16, metres along
    the ray, 0 for none.
    """
    _, depth, which = _cast(scene, size)
    classes = np.where(np.isfinite(depth), 2, 1)
    for number, solid in enumerate(scene.solids):
        classes[which == number] = 1 + MAP_CLASSES.index(solid.kind)
    depth = np.where(depth <= MAP_DEPTH, depth, 0)
    return classes.reshape(size, size).astype(np.uint8), depth.reshape(size, size).astype(np.float16)


def is_scenes(folder: str | Path) -> bool:
    """Whether a folder is one that ensure_scenes gave."""
    return _NAME.fullmatch(Path(folder).name) is not None


def ensure_maps(scenes: str | Path, processes: int | None = None) -> dict[str, str]:
    """The maps of the scenes in a folder that ensure_scenes gave: {"segmentation": a folder, "depth": a folder}.

    There is a file of the stem of each image in them. They are drawn, beside the scenes, if they are not there yet.
    Raises ValueError for another folder.
    """
    scenes = Path(scenes)
    if (found := _NAME.fullmatch(scenes.name)) is None:
        raise ValueError(f"{scenes}: expected a folder of the embedded scenes, named scenes-v{VERSION}-...")
    final = scenes.with_name(f"{scenes.name}-maps")
    if not final.is_dir():
        with publish(final, lock=True) as draft:
            if not final.is_dir():
                for name in ("segmentation", "depth"):
                    (draft / name).mkdir(parents=True)
                count, size, seed = map(int, found.groups())
                _render(draft, count, size, seed, processes, maps=True)
    return {name: str(final / name) for name in ("segmentation", "depth")}


def _main() -> None:
    """Render scenes start to stop, or draw their maps, into a folder and print the labels of each as a line of JSON."""
    parser = argparse.ArgumentParser(description=_main.__doc__)
    parser.add_argument("folder", type=Path)
    for name in ("start", "stop", "size", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--maps", action="store_true")
    args = parser.parse_args()
    for index in range(args.start, args.stop):
        scene, labels = draw_scene(args.seed, index)
        file = f"{index:06d}.jpg"
        if args.maps:
            classes, depth = draw_maps(scene, args.size)
            Image.fromarray(classes).save(args.folder / "segmentation" / f"{index:06d}.png")
            np.savez_compressed(args.folder / "depth" / f"{index:06d}.npz", metres=depth)
        else:
            Image.fromarray(render(scene, args.size)).save(args.folder / file, quality=92)
        print(json.dumps({"file": file, **labels}), flush=True)


if __name__ == "__main__":
    _main()
