"""File-system room: the metadata service — names, inodes, sessions, over a key-value store."""
