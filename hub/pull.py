"""Fetch a published checkpoint, verify it, and say what it is and how to load it.

    python hub/pull.py USER/NAME                  # into huggingface_hub's cache
    python hub/pull.py USER/NAME my-model         # into a new folder

All files but pickles are fetched and compared with the sums that the Hub lists; what is damaged is fetched again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from timm_lowrank import CheckpointError
from timm_lowrank.publish import pull


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", metavar="USER/NAME", help="the repository")
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="new or empty (default: the cache)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--token", help="instead of HF_TOKEN or the one of `hf auth login`; may be seen by others")
    parser.add_argument("--sha256", metavar="DIGITS", help="what model.safetensors must have, from someone you trust")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Fetches, describes, and reports a mistake in one message instead of a traceback."""
    given = parse_arguments(arguments)
    try:
        pulled = pull(given.repo_id, given.folder, revision=given.revision, token=given.token, sha256=given.sha256)
        print("\n".join(pulled.description()))
    except CheckpointError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what has arrived is kept; the same command goes on")


if __name__ == "__main__":
    main()
