"""Which windows a batch is made of, and the plain way to gather them."""
