"""The sparse layer: routing, dispatch, experts and load balancing."""
