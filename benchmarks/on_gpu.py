"""All that a machine with a GPU can tell, in one command: `python3 -m benchmarks.on_gpu --out DIR`.

Stages run in order, each in a process of its own under its own time limit; one that fails does not stop the next.
`--stages` picks some, `--list` prints them. Logs and results lie in DIR, with the tiles that the kernel benchmark found
(DIR/tiles.json, kept for later runs in `out/tiles.json`, which the encoder's stages read). Exit code 1 if a stage
failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TILES = ROOT / "out" / "tiles.json"


@dataclass(frozen=True)
class Stage:
    """A command and the seconds that it may take. `needs` names an option without which it is left out."""

    command: str
    seconds: int
    needs: str | None = None


SHIPPED = "m3asr/models/3m-en"
GPU_TESTS = (
    "tests/kernels tests/test_clustered.py tests/test_cuda_engine.py tests/test_cuda_built.py "
    "tests/test_cuda_waveforms.py tests/test_training_step.py"
)
# {out}: the folder for results; {tiles}: `--tiles FILE` once there are any; {manifest}: a list of recordings.
STAGES = {
    "tests": Stage(f"{{python}} -m pytest {GPU_TESTS} -q -n 12 --dist load -p no:cacheprovider", 300),
    # What a change of the experts needs: both products in one launch, and beside it those of sorted tokens.
    "tests-experts": Stage(
        "{python} -m pytest tests/kernels/test_clusters.py tests/kernels/test_experts.py tests/kernels/test_router.py "
        "tests/test_cuda_engine.py -q -n 12 --dist load -p no:cacheprovider",
        150,
    ),
    "kernels-experts": Stage(
        "{python} -m benchmarks.kernels --shapes 1x206 1x1024 --cases experts expert_up expert_down --used "
        "--jobs 0 --budget 45 --out {out}/experts",
        60,
    ),
    "experts": Stage(
        "{python} -m benchmarks.encoder --inputs 1x206 1x1024 --precisions bf16 fp8 --variants blocks "
        "--budget 100 --no-baselines {tiles} --out {out}/experts",
        120,
    ),
    # Tiles, and with them the encoder and its variants: for one short utterance, of which clusters leave Triton the
    # front and the head; for many tokens; and between.
    "kernels-few": Stage(
        "{python} -m benchmarks.kernels --shapes 1x206 --cases first_convolution next_convolution subsampling_out head "
        "best log_softmax --budget 60 --out {out}/few",
        75,
    ),
    "few": Stage(
        "{python} -m benchmarks.encoder --inputs 1x206 --precisions bf16 fp8 --budget 80 --no-baselines {tiles} "
        "--out {out}/few",
        100,
    ),
    # Blocks and experts of few tokens by clusters of programs, products of many by pairs of them.
    "tests-clusters": Stage(
        "{python} -m pytest tests/kernels/test_clusters.py tests/kernels/test_products.py tests/test_clustered.py "
        "-q -n 8 --dist load -p no:cacheprovider",
        120,
    ),
    "pairs": Stage(
        "{python} -m benchmarks.kernels --out {out}/pairs --shapes 16x1024 64x1024 --cases up qkv gated out down "
        "--used --jobs 0 && {python} -m benchmarks.encoder --inputs 16x1024 64x1024 --precisions bf16 fp16 "
        "--variants pairs --no-baselines {tiles} --out {out}/pairs",
        150,
    ),
    "clusters": Stage(
        "{python} -m benchmarks.encoder --inputs 1x206 1x1024 1x2048 --precisions bf16 fp16 --variants cluster "
        "--budget 100 --no-baselines {tiles} --out {out}/clusters",
        120,
    ),
    "phases": Stage(
        "{python} -m benchmarks.leave_out --inputs 1x206 --budget 30 --out {out}/phases",
        70,
    ),
    # Where the time of few tokens goes, in place: so, and as longer utterances are run.
    "leave-out": Stage("{python} -m benchmarks.leave_out --no-clusters {tiles} --out {out}/leave_out", 130),
    "kernels-many": Stage("{python} -m benchmarks.kernels --shapes 64x1024 16x1024 --budget 190 --out {out}/many", 210),
    "many": Stage(
        "{python} -m benchmarks.encoder --inputs 16x1024 64x1024 --precisions bf16 --variants package --budget 120 "
        "--no-baselines {tiles} --out {out}/many",
        130,
    ),
    "kernels-between": Stage(
        "{python} -m benchmarks.kernels --shapes 1x1024 1x2048 --budget 170 --out {out}/between", 190
    ),
    "in-place": Stage("{python} -m benchmarks.in_place --inputs 1x1024 1x2048 --out {out}/in_place", 180),
    "between": Stage(
        "{python} -m benchmarks.encoder --inputs 1x1024 1x2048 --precisions bf16 --budget 120 --no-baselines {tiles} "
        "--out {out}/between",
        110,
    ),
    "kernels-some": Stage(
        "{python} -m benchmarks.kernels --shapes 4x1024 8x1024 --cases expert_up expert_down sort norm attention "
        "depthwise next_convolution subsampling_out first_convolution head log_softmax --budget 150 --out {out}/some",
        170,
    ),
    "some": Stage(
        "{python} -m benchmarks.encoder --inputs 4x1024 8x1024 --precisions bf16 fp16 --variants pairs --budget 80 "
        "--no-baselines {tiles} --out {out}/some",
        100,
    ),
    # What a table of results needs, with all decisions taken.
    "texts": Stage(
        "{python} -m benchmarks.texts --manifest {manifest} --precisions bf16 fp32 --batch 64 --out {out}",
        200,
        needs="manifest",
    ),
    "encoder": Stage(
        "{python} -m benchmarks.encoder --precisions bf16 fp16 fp8 fp32 --no-variants --budget 170 {tiles} "
        "--out {out}/encoder",
        210,
    ),
    "end-to-end": Stage("{python} -m benchmarks.end_to_end --engines cuda --model seed {tiles} --out {out}/seed", 100),
    # The package's tiles, then those found, then those and the best path without log-probabilities, as it is.
    "end-to-end-many": Stage(
        'go="{python} -m benchmarks.end_to_end --engines cuda --model seed --precisions bf16 --batches 16 64 '
        '--budget 3 --repeats 3"; $go --log-probs --out {out}/before; $go --log-probs {tiles} --out {out}/tiles; '
        "$go {tiles} --out {out}/best",
        150,
    ),
    "end-to-end-shipped": Stage("{python} -m benchmarks.end_to_end --engines cuda --out {out}/shipped", 100),
    "command-line": Stage(
        f"rm -rf {{scratch}} && cp -r {SHIPPED} {{scratch}} || exit 1; for precision in fp32 bf16; do "
        "{python} -m m3asr build {scratch} --engine cuda --precision $precision || exit 1; "
        "time {python} -m m3asr transcribe --model {scratch} --engine cuda examples/*.flac || exit 1; done; "
        "{python} -m m3asr transcribe --model {scratch} --engine eager examples/*.flac",
        180,
    ),
    "public": Stage(
        "{python} -m benchmarks.encoder --preset public --precisions bf16 --no-variants --budget 120 "
        "--out {out}/public",
        180,
    ),
    "compiled": Stage(
        "{python} -m benchmarks.encoder --inputs 1x206 1x1024 --precisions bf16 --no-variants --compile 240 "
        "{tiles} --out {out}/compiled",
        330,
    ),
}


def run(name: str, stage: Stage, args) -> int:
    """Run one stage, its output shown and kept in DIR/NAME.log; -> exit code, 124 for one that was stopped."""
    tiles = f"--tiles {TILES}" if TILES.is_file() else ""
    command = stage.command.format(
        python=sys.executable, out=args.out, tiles=tiles, manifest=args.manifest, scratch=ROOT / "out" / "model"
    )
    print(f"\n=== {name} (at most {stage.seconds} s): {command}", flush=True)
    began = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with open(args.out / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(stage.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the stage's own process group, its workers with it
            process.wait()
            code = 124
    lines = (args.out / f"{name}.log").read_text(errors="replace").splitlines()
    for line in lines[-args.show :]:
        print(line[:400])
    print(f"=== {name}: exit code {code}, {time.monotonic() - began:.0f} s", flush=True)
    return code


def keep_tiles(out: Path) -> None:
    """Tiles found by any stage, joined into one file: a shape that was measured again replaces the older result."""
    from benchmarks.kernels import join_tiles

    found = [path for path in (TILES, *sorted(out.glob("*/tiles.json"))) if path.is_file()]
    if found:
        TILES.parent.mkdir(exist_ok=True)
        TILES.write_text(join_tiles(found))
        shutil.copy(TILES, out / "tiles.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--manifest", type=Path, help="recordings with texts, for the stage `texts`")
    parser.add_argument("--show", type=int, default=40, help="last lines of each stage's log that are printed")
    parser.add_argument("--archive", action="store_true", help="also DIR/results.tar.gz, with all of it in one file")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        for name, stage in STAGES.items():
            print(f"{name:20s} {stage.seconds:4d} s  {stage.command}")
        return
    given, target = args.out.resolve(), args.out.resolve()
    if args.archive:  # apart, so that the archive is the only thing in DIR
        args.out = ROOT / "out" / "results"
        shutil.rmtree(args.out, ignore_errors=True)
    else:
        args.out = given
    args.out.mkdir(parents=True, exist_ok=True)
    codes = {}
    for name in args.stages:
        stage = STAGES[name]
        if stage.needs and getattr(args, stage.needs) is None:
            print(f"=== {name}: left out, it needs --{stage.needs}")
            continue
        codes[name] = run(name, stage, args)
        keep_tiles(args.out)
        if args.archive:
            target.mkdir(parents=True, exist_ok=True)
            shutil.make_archive(str(target / "results"), "gztar", args.out)
            if TILES.is_file():
                shutil.copy(TILES, target / "tiles.json")
    print("\n" + "  ".join(f"{name} {'ok' if code == 0 else code}" for name, code in codes.items()))
    sys.exit(any(codes.values()))


if __name__ == "__main__":
    main()
