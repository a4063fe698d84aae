"""Impulse responses of random rooms by the image source method: `python3 -m training.rooms OUT`, for `train --rooms`.

    pip install pyroomacoustics soundfile tqdm

A cupboard to a hall; walls, floor and ceiling absorb differently; the speaker is near or far. Unlike decaying noise
such a response has early reflections, which colour a voice (Allen & Berkley 1979).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

RATE = 16000
LARGEST_ORDER = 15  # of reflections; what comes later is weak, and images grow with the cube of it


def response(random: np.random.Generator) -> np.ndarray:
    """-> float32, at most a second."""
    import pyroomacoustics

    low, high = np.array([1.6, 1.8, 2.2]), np.array([22.0, 16.0, 7.0])
    size = low * (high / low) ** (random.random() * random.uniform(0.7, 1.0, 3))  # m
    absorption = np.exp(random.uniform(math.log(0.03), math.log(0.4), 6))
    walls = pyroomacoustics.make_materials(
        **{
            name: float(a)
            for name, a in zip(("east", "west", "north", "south", "floor", "ceiling"), absorption, strict=True)
        }
    )
    room = pyroomacoustics.ShoeBox(size, fs=RATE, materials=walls, max_order=LARGEST_ORDER, air_absorption=True)
    ear = random.uniform(0.2, size - 0.2)
    distance = math.exp(random.uniform(math.log(0.3), math.log(8.0)))
    for _ in range(100):
        direction = random.normal(size=3) * (1.0, 1.0, 0.3)
        mouth = ear + direction / np.linalg.norm(direction) * distance
        if ((mouth > 0.1) & (mouth < size - 0.1)).all():
            break
        distance *= 0.95
    room.add_source(mouth)
    room.add_microphone(ear)
    room.compute_rir()
    rir = room.rir[0][0]
    first = np.abs(rir).argmax()
    rir = rir[max(first - 32, 0) :][:RATE]
    loud = np.flatnonzero(np.abs(rir) > 1e-3 * np.abs(rir).max())
    return (rir[: loud[-1] + 1] / np.abs(rir).max() * 0.9).astype(np.float32)


def main() -> None:
    import soundfile
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(args.seed)
    for number in tqdm(range(args.count), desc="rooms"):
        soundfile.write(args.out / f"simulated-{number:04d}.wav", response(random), RATE, subtype="PCM_16")


if __name__ == "__main__":
    main()
