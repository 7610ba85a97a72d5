"""MultiTalk as a service: jobs in, talking-person videos out. Importing this loads no model and no torch."""
