"""File-system room: the client — placement, batches, retries, files."""
