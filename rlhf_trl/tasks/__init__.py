"""Examples outside the core: tasks with data and rewards of their own."""
