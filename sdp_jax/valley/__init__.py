"""The valley: its directions, SDP within it, and whether a solution lies in it."""
