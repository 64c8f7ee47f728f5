"""File-system room: the storage node — chunk engine on disk, replica on the network."""
