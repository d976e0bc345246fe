"""Imported last by the server that `forked.py` forks from.

accelerate collects garbage before and after each run, and nearly all that it would look at are the modules that the
server has imported: a third of a second each time.
"""

import gc

gc.collect()
gc.freeze()
