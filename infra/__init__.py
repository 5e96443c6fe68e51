"""What any training run needs: files, settings, ranks, checkpoints. Knows no transformer."""
