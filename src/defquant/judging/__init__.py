"""Judge anyone's model: its file read into a twin with gradients, its input contract found."""
