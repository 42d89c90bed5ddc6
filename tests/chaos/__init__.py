"""Proof by killing: real processes under a mixed load are killed, and what they leave is checked (`make chaos`)."""
