"""Bytes that each phase of generating takes besides weights, from the configs of its network."""
