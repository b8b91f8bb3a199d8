"""What runs a wrapper, and what brings it to disk and back; knows it by its hooks only."""
