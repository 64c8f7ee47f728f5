"""File-system room: metadata operations as functions of one transaction; no IO, clock or threads.

Each adds by hand the conflicts that make it serialisable (3FS's conflict sets, where POSIX asks
for more, more). `service.py` of the room gives them a transaction, the time, and inode numbers.
"""
