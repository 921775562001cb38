"""Scores of generated images: features, statistics, Fréchet distance, class agreement, reports."""
