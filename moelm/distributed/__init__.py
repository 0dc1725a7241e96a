"""One run on several processes: their layout, what they say to each other, and how the model is spread over them."""
