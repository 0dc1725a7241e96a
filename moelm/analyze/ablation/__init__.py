"""What a model's loss is without an expert, with other routes, or with fewer experts: causes, beside the counts of
`moelm.analyze`."""
