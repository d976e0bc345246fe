"""Processes that die at the worst moment, by command: what they had written must hold.

    python -m tests.torture                                  # everything: hours on a core
    python -m tests.torture training saving --every 5        # each fifth moment of two scenarios
    python -m tests.torture adding --only full               # one kind of fault
    python -m tests.torture --list

A scenario is something that the package writes: a training by one process or two, a saving over an older checkpoint, an
evaluation, a push.
It is done once undisturbed, and then again and again with a fault: a signal before each of its file operations and at
random moments, a file system that takes no more than so many bytes a file, a loss of power. Then the same command is
given again, and it must come to the undisturbed result, bit for bit. `tests/test_torture.py` runs a short form.

`faults`     a forked process with a fault at one exact moment
`scenarios`  what is done, and what must be true afterwards
"""
