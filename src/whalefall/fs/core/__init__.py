"""File-system room: everything that decides, without IO, clock or threads.

Procedures are generators that yield effects (`effects.py`) and get their results; servers run them
on real disks and sockets, the simulator runs the very same code on a seeded schedule.
"""
