"""Training on several processes: parallel dimensions, communication, sharding of the model, failure detection."""
