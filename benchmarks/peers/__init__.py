"""Peers that `width` runs beside ours, each in an environment of its own that `make peers` sets up.

Each is a program that gets a job as JSON, the file of the splits, and the file to write the network
to that it made.
"""
