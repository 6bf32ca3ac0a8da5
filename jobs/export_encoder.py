"""Write the item encoder of a run as a sentence-transformers folder, ready for a model hub.

python jobs/export_encoder.py RUN OUT

SentenceTransformer(OUT).encode(texts) then returns the vectors of RUN's index, scaled to length 1.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import parser, run


def main(argv: list[str] | None = None) -> None:
    """Export, and print what was written."""
    flags = parser(__doc__ or "")
    flags.add_argument("run", metavar="RUN", help="run folder with a finished bundle/")
    flags.add_argument("out", metavar="OUT", help="a new or empty folder (or URI) to write")
    arguments = flags.parse_args(argv)
    from karma_ray.retrieval.sentence_encoder import export_encoder

    facts = export_encoder(arguments.run, arguments.out)
    print(
        f"{facts['width']} dimensions, at most {facts['max_tokens']} tokens, pooling "
        f"{facts['pool']} -> {arguments.out}\n"
        f"next: huggingface-cli upload USER/NAME {shlex.quote(arguments.out)}"
    )


if __name__ == "__main__":
    run(main)
