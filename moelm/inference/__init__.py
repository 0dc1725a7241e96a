"""Text generation, and a fast decoder for CPUs."""
