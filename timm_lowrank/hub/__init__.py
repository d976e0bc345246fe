"""Publishing trained runs on the Hugging Face Hub with an honest card, and fetching what others published.

record      a finished run, read and checked
figures     what it has measured
sections, findings, metadata, merging, card     its card
publishing  the push, as one commit
fetching    the way back
manifest    the list of published checkpoints
releases    what is done with it
"""

from .card import card_of
from .fetching import Pulled, pull
from .manifest import Manifest, Row, load_manifest
from .publishing import Outcome, publish_run
from .record import RunRecord, read_run
from .releases import headline, manifest_row, manifest_table, publish_all, write_table

__all__ = [
    "Manifest",
    "Outcome",
    "Pulled",
    "Row",
    "RunRecord",
    "card_of",
    "headline",
    "load_manifest",
    "manifest_row",
    "manifest_table",
    "publish_all",
    "publish_run",
    "pull",
    "read_run",
    "write_table",
]
