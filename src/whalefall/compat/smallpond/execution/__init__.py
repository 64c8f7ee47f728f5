"""smallpond.execution: tasks and the driver."""
