"""Publish a trained run on the Hugging Face Hub: the network, its branches, its evaluation, and a card.

    python hub/push.py runs/digits USER/NAME --dry-run preview     # writes what would be pushed, and pushes nothing
    python hub/push.py runs/digits USER/NAME

RUN is a finished run of recipes/train.py, evaluated or not. Everything goes in one commit; pushing again updates it,
and keeps what was written into the card by hand. Log in with `hf auth login` or set HF_TOKEN.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from timm_lowrank import CheckpointError
from timm_lowrank.errors import LowRankError
from timm_lowrank.publish.run import publish_run


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("repo_id", metavar="USER/NAME", help="the repository; is made if there is none")
    parser.add_argument(
        "--dry-run", type=Path, metavar="FOLDER",
        help="write exactly what would be pushed to a new folder, and push nothing",
    )  # fmt: skip
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository a private one")
    parser.add_argument("--token", help="instead of HF_TOKEN or the one of `hf auth login`; may be seen by others")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch (default: the main one); is made if needed")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="of the weights, as the Hub names it (default: the card's, or apache-2.0)",
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="the data set's name on the Hub, if the run had a copy of it in a folder"
    )
    parser.add_argument("--keep-card", action="store_true", help="leave the repository's README.md as it is")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Publishes, says what, and reports a mistake in one message instead of a traceback."""
    given = parse_arguments(arguments)
    try:
        outcome = publish_run(
            given.run, given.repo_id, token=given.token, private=given.private, revision=given.revision,
            license=given.license, dataset=given.dataset, keep_card=given.keep_card, dry_run=given.dry_run,
        )  # fmt: skip
        print("\n".join(outcome.description()), flush=True)
    except (CheckpointError, LowRankError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what had not been committed is not published; the same command begins again")


if __name__ == "__main__":
    main()
