"""Act two: makes an image and tests it as it is."""
