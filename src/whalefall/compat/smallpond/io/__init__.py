"""smallpond.io: Arrow tables and files."""
