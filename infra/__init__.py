"""What any training run needs: files, settings, ranks, checkpoints, metrics. Knows no transformer."""
