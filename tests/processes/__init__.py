"""What the tests over several processes share: networks, one training loop, the worker and its launchers."""
