"""Recognising attention in its many forms, and lifting its masks and score changes to rules."""
