"""What the routers of a model do with text: counted in one pass, tested against chance, told in numbers and pictures."""
