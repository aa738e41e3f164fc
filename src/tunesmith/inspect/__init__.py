"""Looking at data before it is trained on: `data check` reads all of it, `data show` paints what the model will get."""
