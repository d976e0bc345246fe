"""What the suites measure: each class one thing, in pieces that any process can take."""
