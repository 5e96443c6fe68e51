"""What a model is trained and asked on: texts, questions, verifiers. Has never seen a model."""
