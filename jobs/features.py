"""Encode item images into DATA/visual_features: frozen features that the visual term reconstructs.

python jobs/features.py DATA --encoder FOLDER --target grid:16
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import parser, run
from karma_ray.cluster.features import make_features
from karma_ray.data.visual import TARGETS, features_uri
from karma_ray.runs.features import DEFAULT_WIDTH, PATCH_PCA, FeaturesConfig


def main(argv: list[str] | None = None) -> None:
    """Make the features and print their counts."""
    flags = parser(__doc__ or "")
    flags.add_argument("data", metavar="DATA", help="data folder with items/ that have images")
    flags.add_argument(
        "--encoder", default=PATCH_PCA, metavar="NAME|FOLDER",
        help=f"{PATCH_PCA} (built in, the default), or a Hugging Face vision encoder: ViT, DINOv2, "
        "CLIP, SigLIP, a convolutional one, or Qwen3-VL's tower",
    )  # fmt: skip
    flags.add_argument(
        "--target", choices=list(TARGETS), default="grid:16",
        help="tokens of an image: one, 4 x 4 (the default) or 8 x 8",
    )  # fmt: skip
    flags.add_argument(
        "--width", type=int, help=f"components of {PATCH_PCA} (default {DEFAULT_WIDTH})"
    )
    flags.add_argument("--seed", type=int, default=0, help="seed of the sample for patch_pca")
    flags.add_argument(
        "--actors", type=int,
        help="encoders in parallel on Ray; 1 is this process (default: one for each GPU that is up "
        "or may be added, or else each core, if the catalogue is large enough)",
    )  # fmt: skip
    flags.add_argument("--out", metavar="URI", help="write here instead of DATA/visual_features")
    arguments = flags.parse_args(argv)
    config = FeaturesConfig(arguments.encoder, arguments.target, arguments.width, arguments.seed)
    started = time.monotonic()
    facts = make_features(arguments.data, config, arguments.out, arguments.actors)
    seconds = time.monotonic() - started
    print(f"{facts['num_tokens']} x {facts['width']} per image in {seconds:.0f} s")
    for name in ("num_items", "with_image", "without_image", "broken_image"):
        print(f"  {name.replace('_', ' '):<20} {facts[name]:>12,}")
    print(f"  {'fitted on':<20} {facts['fitted_on']:>12}")
    if "explained_variance" in facts:
        print(f"  {'explained variance':<20} {facts['explained_variance']:>12.1%}")
    print(f"-> {arguments.out or features_uri(arguments.data)}")


if __name__ == "__main__":
    run(main)
