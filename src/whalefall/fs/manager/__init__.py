"""File-system room: the cluster manager as a process."""
