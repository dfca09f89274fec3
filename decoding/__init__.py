"""Decoding: how a round is played. From a plan to drafted, verified and accepted tokens."""
