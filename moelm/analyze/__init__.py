"""What the routers of a trained model do: counts over text, statistics, and the report of `moelm analyze`."""
