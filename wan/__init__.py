"""MultiTalk on Wan2.1: the model."""
