"""smallpond.contrib: ready-made nodes."""
