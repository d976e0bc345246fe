"""Publishing on the Hugging Face Hub with an honest card, and fetching what others published.

push           `push_to_hub`: a model or checkpoint as one commit, with a short card
run            `publish_run`: a finished run with its evaluation and a full card
record         a finished run and its evaluation, read and checked
card           the card, from the template card.md.jinja
front_matter   of a card, read
merging        a card that is written anew while what its owner wrote in it stays
fetch          `pull`: a published checkpoint, fetched and verified
checkpoints    the list of published checkpoints

What is not imported here, `publish_run` before all, reads runs and takes the package's extra "train".
"""

from .fetch import Pulled, pull
from .push import Published, push_to_hub

__all__ = ["Published", "Pulled", "pull", "push_to_hub"]
