"""Other frameworks' checkpoints to our parameters and back."""
