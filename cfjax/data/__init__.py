"""Images for training and evaluation: sources with random access, and the loader of batches."""
